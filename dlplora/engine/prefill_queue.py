"""Sequences whose prompts are read, a part at a time."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from dlplora.attention import knows_masks
from dlplora.engine.cache import KeyValues, new_cache
from dlplora.engine.grouping import parts_to_read
from dlplora.engine.prefill import Prefill
from dlplora.engine.prefix_cache import PrefixCache
from dlplora.engine.sequence import Sequence
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import own_layers
from dlplora.models import Base


@dataclass
class _Group:
    prefill: Prefill
    sequences: list[Sequence]
    since: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Read:
    """Sequences whose prompts were read within so many seconds, or the error that ended that."""

    sequences: list[Sequence]
    prefill: Prefill
    seconds: float
    error: Exception | None = None


class PrefillQueue:
    """Prompts that are to be read, in groups of like length.

    A short prompt waits for one part of a long one: the group with the least left is read next. A
    long one is not kept waiting by short ones: after such a group the oldest has its turn.
    """

    def __init__(self, base: Base, layers: FusedLayers, cache: PrefixCache | None) -> None:
        self._base = base
        self._layers = layers
        self._cache = cache
        self._can_begin_late = knows_masks(base.model, new_cache(base, 1))
        self._groups: list[_Group] = []
        self._is_oldest_next = False

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def sequences(self) -> Iterator[Sequence]:
        """The sequences that are not ended."""
        return (one for group in self._groups for one in group.sequences if one.is_open)

    def add(self, sequences: list[Sequence]) -> None:
        """Let all that was asked and written so far be read, each by its row of now."""
        by_kind: dict[object, list[Sequence]] = {}
        for sequence in sequences:
            kind = id(sequence.router) if sequence.probe else own_layers(sequence.row)
            by_kind.setdefault((sequence.probe is None, kind), []).append(sequence)
        groups = [group for own in by_kind.values() for group in self._grouped(own)]
        for sequence in sequences:
            sequence.is_rerouted = sequence.is_rerouted and sequence.probe is not None
        self._groups += groups

    def _grouped(self, sequences: list[Sequence]) -> Iterator[_Group]:
        known = [self._known(sequence) for sequence in sequences]
        lengths = [
            len(sequence.ids) - (0 if found is None else found[0][0].shape[1])
            for sequence, found in zip(sequences, known, strict=True)
        ]
        for part in map(sorted, parts_to_read(self._base, lengths)):
            yield self._group(
                [sequences[place] for place in part], [known[place] for place in part]
            )

    def drop_ended(self) -> None:
        """Let go of groups of which nothing is wanted any more."""
        self._groups = [one for one in self._groups if any(s.is_open for s in one.sequences)]

    def advance(self, num_tokens: int | None) -> list[Read]:
        """Read a part of about so many tokens, or all that there is; return what is read now."""
        if not self._groups:
            return []
        if num_tokens is None:
            return [read for group in list(self._groups) for read in self._advance(group, None)]
        shortest = min(self._groups, key=lambda group: group.prefill.num_tokens)
        group = self._groups[0] if self._is_oldest_next else shortest
        self._is_oldest_next = group is not self._groups[0]
        return self._advance(group, num_tokens)

    def _advance(self, group: _Group, num_tokens: int | None) -> list[Read]:
        error = None
        try:
            if not group.prefill.advance(num_tokens):
                return []
        except Exception as failure:  # of the model, or for want of memory
            error = failure
        self._groups.remove(group)
        for sequence, scores in zip(group.sequences, group.prefill.scores, strict=True):
            sequence.prompt_scores = sequence.prompt_scores or tuple(scores)
        seconds = time.perf_counter() - group.since
        return [Read(group.sequences, group.prefill, seconds, error)]

    def _group(self, members: list[Sequence], known: list[KeyValues | None]) -> _Group:
        probe = members[0].probe
        prefill = Prefill(
            self._base,
            self._layers,
            [sequence.ids for sequence in members],
            [() if probe else sequence.row for sequence in members],
            known=known,
            watch=probe.path if probe else None,
            num_top=[s.request.logprobs if s.wants_prompt_scores else None for s in members],
        )
        return _Group(prefill, members)

    def _known(self, sequence: Sequence) -> KeyValues | None:
        """Return what is known of a prompt's beginning; nothing where all of it has to be read."""
        if self._cache is None or sequence.probe or sequence.wants_prompt_scores:
            return None
        if not self._can_begin_late:
            return None
        found = self._cache.find(sequence.row, sequence.ids)
        if found is not None and len(sequence.ids) == sequence.num_prompt:
            sequence.num_cached = found[0][0].shape[1]
        return found
