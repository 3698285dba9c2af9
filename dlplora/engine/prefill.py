"""Prompts become batches: read together, in parts, what they share only once.

Shapes: B prompts, S tokens, I inputs of a layer, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlplora.attention import knows_masks
from dlplora.data.batches import Padded, pad_left, shared_beginning
from dlplora.engine import cache as caches
from dlplora.engine import grouping
from dlplora.engine.batch import Batch, read_into
from dlplora.engine.cache import KeyValues
from dlplora.engine.logprobs import TokenScore, first_score, token_scores
from dlplora.errors import RouterError
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import BatchMix, Row, Watch
from dlplora.models import Base


@dataclass
class _Stretch:
    """Tokens of some rows that are still to be read, all rows' last tokens in the last column."""

    padded: Padded
    mix: BatchMix
    done: int = 0  # columns that were read

    @property
    def num_columns(self) -> int:
        return self.padded.ids_BS.shape[1]


class Prefill:
    """Prompts that are read together, part by part.

    What all begin with is read once for each different mix, if that saves time.

    Args:
        base: The base model.
        layers: Its fused layers.
        prompts: The tokens of each prompt.
        rows: What answers each.
        known: The keys and values of the first tokens of each prompt, where they are known; not
            of all of its tokens.
        watch: A layer whose input at each prompt's last token is wanted.
        num_top: For each prompt how many alternatives its own tokens are scored with; None scores
            none of them.
    """

    def __init__(
        self,
        base: Base,
        layers: FusedLayers,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Row],
        *,
        known: Sequence[KeyValues | None] = (),
        watch: str | None = None,
        num_top: Sequence[int | None] = (),
    ) -> None:
        self._base = base
        self._layers = layers
        self._prompts = prompts
        self._num_top = num_top or [None] * len(prompts)
        self._watch = None if watch is None else Watch(watch, range(len(prompts)))
        self._mix = BatchMix(rows, self._watch)
        self._cache = caches.new_cache(base, len(prompts))
        self._can_pause = knows_masks(base.model, self._cache)
        self._owners: list[int] = []  # whose beginning each prompt has
        self._logits_BV = torch.empty(0)
        self.scores: list[list[TokenScore]] = [
            [] if top is None else [first_score(prompt[0], base.chat)]
            for prompt, top in zip(prompts, self._num_top, strict=True)
        ]
        lengths = [0] * len(prompts)
        self._mask_BS = torch.ones(len(prompts), 0, dtype=torch.long)
        self._stretches = []
        if any(row is not None for row in known):
            self._mask_BS = caches.fill(self._cache, known)
            lengths = [0 if row is None else row[0][0].shape[1] for row in known]
        elif shared := self._num_shared():
            firsts, self._owners = self._mix.distinct()
            beginnings = pad_left([prompts[row][:shared] for row in firsts], base.chat.pad_id)
            self._stretches.append(_Stretch(beginnings, self._mix.select(firsts)))
            self._mask_BS = self._mask_BS[: len(firsts)]
            lengths = [shared] * len(prompts)
        rest = [prompt[start:] for prompt, start in zip(prompts, lengths, strict=True)]
        padded = pad_left(rest, base.chat.pad_id)
        starts_B1 = torch.tensor(lengths)[:, None]
        padded = Padded(padded.ids_BS, padded.mask_BS, padded.positions_BS + starts_B1)
        self._stretches.append(_Stretch(padded, self._mix))

    def _num_shared(self) -> int:
        """Return how many tokens all prompts begin with, if they are worth a pass of their own."""
        if not self._can_pause or any(top is not None for top in self._num_top):
            return 0
        shared = shared_beginning(self._prompts)
        saved = shared * (len(self._prompts) - len(self._mix.distinct()[0]))
        return shared if saved >= grouping.limits_of(self._base.device).pass_tokens else 0

    @property
    def num_tokens(self) -> int:
        """How many tokens are left to read, padding included."""
        return sum(
            len(stretch.mix.rows) * (stretch.num_columns - stretch.done)
            for stretch in self._stretches
        )

    @torch.inference_mode()
    def advance(self, num_tokens: int | None = None) -> bool:
        """Read a part of about so many tokens, or all; tell whether nothing is left to read.

        A model that goes by places in its cache reads all prompts at once.
        """
        stretch = self._stretches[0]
        start, end = stretch.done, stretch.num_columns
        if num_tokens is not None and self._can_pause:
            end = min(end, start + max(1, num_tokens // len(stretch.mix.rows)))
        columns = slice(start, end)
        part = Padded(
            stretch.padded.ids_BS[:, columns],
            stretch.padded.mask_BS[:, columns],
            stretch.padded.positions_BS[:, columns],
        )
        mask_BS = torch.cat([self._mask_BS, part.mask_BS], 1)
        is_last = len(self._stretches) == 1 and end == stretch.num_columns
        keep_BS = self._kept(part) if len(self._stretches) == 1 else torch.zeros_like(part.ids_BS)
        keep_BS[:, -1] |= is_last
        logits_nV = read_into(
            self._cache,
            self._base,
            self._layers,
            stretch.mix,
            part,
            keep_BS.bool(),
            mask=mask_BS,
        )
        self._mask_BS = mask_BS
        ends_B = keep_BS.sum(1).cumsum(0)
        if any(top is not None for top in self._num_top):
            self._score(logits_nV, part, ends_B.tolist())
        if is_last:
            self._logits_BV = logits_nV[ends_B.to(logits_nV.device) - 1].float()
        stretch.done = end
        if end == stretch.num_columns:
            self._end_stretch()
        return not self._stretches or (num_tokens is None and self.advance())

    def _end_stretch(self) -> None:
        """Go to the next stretch; each prompt gets its copy of what it shares with others."""
        del self._stretches[0]
        if self._owners:
            caches.select(self._cache, self._owners, self._base.device)
            self._mask_BS = self._mask_BS[self._owners]
            self._owners = []

    def _kept(self, part: Padded) -> Tensor:
        """Mark the tokens whose logits are wanted because they score those that follow."""
        is_scored_B = torch.tensor([top is not None for top in self._num_top])
        return part.mask_BS * is_scored_B[:, None]

    def _score(self, logits_nV: Tensor, part: Padded, ends: Sequence[int]) -> None:
        """Score the tokens that follow those of a part."""
        for row, (prompt, top) in enumerate(zip(self._prompts, self._num_top, strict=True)):
            if top is None:
                continue
            begun = len(self.scores[row])
            count = min(int(part.mask_BS[row].sum()), len(prompt) - begun)
            start = ends[row - 1] if row else 0
            tokens = prompt[begun : begun + count]
            self.scores[row] += token_scores(
                logits_nV[start : start + count], tokens, [top] * count, self._base.chat
            )

    def batch(self) -> Batch:
        """Return what was read, once nothing is left to read."""
        return Batch(
            self._base,
            self._layers,
            mix=self._mix if self._watch is None else self._mix.with_rows(self._mix.rows),
            cache=self._cache,
            mask_BS=self._mask_BS,
            positions_B=torch.tensor([len(prompt) - 1 for prompt in self._prompts]),
            logits_BV=self._logits_BV,
        )

    def inputs(self) -> Tensor:
        """Return what the watched layer read of each prompt's last token (B, I).

        Raises `RouterError` if no adapter changes that layer.
        """
        assert self._watch is not None
        if not self._watch.seen:
            raise RouterError(
                f"{self._watch.path}: no adapter changes this layer, so nothing can be read there"
            )
        return torch.stack([self._watch.seen[number] for number in range(len(self._prompts))])
