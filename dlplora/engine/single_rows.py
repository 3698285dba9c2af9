"""Rows that a model reads one by one, each with a state of its own, and none of them padded.

For models whose convolutions, linear attention or state spaces would take in padding. What is
slow about it: a batch takes as many passes as it has rows.

Shapes: B rows, S tokens, n places, V vocabulary.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dlplora.data.batches import Padded
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import BatchMix
from dlplora.models import Base, head_at

_STATES = ("past_key_values", "cache_params")  # as transformers' models name what they keep


@dataclass
class _Row:
    """The tokens that were read, and what the model kept of them under its own name."""

    ids: list[int] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


class SingleRows:
    """The rows of a batch, in place of transformers' cache."""

    def __init__(self, num_rows: int) -> None:
        self.layers: list[Any] = []  # has no keys and values of all rows
        self._rows = [_Row() for _ in range(num_rows)]
        self._mix: BatchMix | None = None
        self._mixes: list[BatchMix] = []  # of each row, laid out once

    def select(self, numbers: Sequence[int]) -> None:
        """Keep these rows; one that is named twice is copied."""
        rows = [self._rows[number] for number in numbers]
        seen: set[int] = set()
        self._rows = []
        for row in rows:
            self._rows.append(copy.deepcopy(row) if id(row) in seen else row)
            seen.add(id(row))

    def copy(self) -> "SingleRows":
        """Return rows that continue by themselves: states are changed in place."""
        fork = SingleRows(0)
        fork._rows = copy.deepcopy(self._rows)
        return fork

    def extend(self, other: "SingleRows") -> None:
        """Take in the rows of another batch, behind the own ones."""
        self._rows += other._rows

    def read(
        self, base: Base, layers: FusedLayers, mix: BatchMix, batch: Padded, keep_BS: Tensor
    ) -> Tensor:
        """Read each row's tokens behind its own; return the logits (n, V) where they are wanted."""
        if mix is not self._mix:
            self._mix = mix
            self._mixes = [mix.select([number]) for number in range(len(self._rows))]
        found = []
        for number, row in enumerate(self._rows):
            is_own_S = batch.mask_BS[number].bool()
            ids, keep = batch.ids_BS[number][is_own_S], keep_BS[number].bool()[is_own_S]
            with layers.mixing(self._mixes[number]):
                found += _read(base, row, ids.tolist(), keep.tolist())
        return torch.cat(found)


def _read(base: Base, row: _Row, ids: Sequence[int], keep: Sequence[bool]) -> list[Tensor]:
    """Read tokens: all at once at first, then one by one, which continues any kind of state."""
    size = len(ids) if not row.ids else 1
    found = []
    for start in range(0, len(ids), size):
        row.ids += ids[start : start + size]
        new = list(ids[start : start + size]) if row.state else row.ids
        named = row.state | _positions(base, len(row.ids) - len(new), len(row.ids))
        wanted = [False] * (len(new) - size) + list(keep[start : start + size])
        wanted_1S = torch.tensor([wanted])
        with head_at(base.model, wanted_1S):
            ids_1S = torch.tensor([new], device=base.device)
            output = base.model(input_ids=ids_1S, use_cache=True, **named)
        row.state = {name: output[name] for name in _STATES if output.get(name) is not None}
        found.append(output.logits[0])
    return found


def _positions(base: Base, start: int, stop: int) -> dict[str, Tensor]:
    """Return the positions of tokens if the model takes any; it may count wrongly by itself."""
    if "position_ids" not in inspect.signature(base.model.forward).parameters:
        return {}
    return {"position_ids": torch.arange(start, stop, device=base.device)[None]}
