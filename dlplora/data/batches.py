"""Token lists as batches: padding, and an endless stream of batches of like length.

Shapes: B rows, S tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

_WINDOW_BATCHES = 8
_BEGINNING = 16  # tokens; fewer are hardly worth being computed once


@dataclass(frozen=True)
class Padded:
    """Token ids (B, S), 1 where they are real (B, S), and their positions (B, S)."""

    ids_BS: Tensor
    mask_BS: Tensor
    positions_BS: Tensor

    def to(self, device: torch.device) -> "Padded":
        """Move to a device."""
        return Padded(self.ids_BS.to(device), self.mask_BS.to(device), self.positions_BS.to(device))


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> Padded:
    """Pad in front, so that the last token of every row stands in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return Padded(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> Padded:
    """Pad behind, so that the first token of every row stands in the first column."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [pad_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return Padded(ids, mask, torch.arange(width).expand(len(rows), -1))


def batch_order(
    lengths: Sequence[int], batch_size: int, *, seed: int, groups: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Yield batches of row numbers for ever, rows of like lengths and of one group together.

    Each epoch shuffles the rows, leaves out those that fill no batch, sorts windows of a few
    batches by group and length – equal rows stay shuffled – cuts them, and shuffles the batches.
    Fewer rows than `batch_size` make one batch.
    """
    rng = np.random.default_rng(seed)
    size = min(batch_size, len(lengths))
    keys = list(zip(groups or [0] * len(lengths), lengths, strict=True))
    while True:
        rows = rng.permutation(len(lengths))[: len(lengths) // size * size].tolist()
        batches = []
        for start in range(0, len(rows), _WINDOW_BATCHES * size):
            part = sorted(rows[start : start + _WINDOW_BATCHES * size], key=keys.__getitem__)
            batches += [part[at : at + size] for at in range(0, len(part), size)]
        for number in rng.permutation(len(batches)):
            yield batches[number]


def batches_in_order(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield row after row in batches, for ever; within one the shortest come first."""
    rows = cycle(range(len(lengths)))
    while True:
        yield sorted(islice(rows, batch_size), key=lengths.__getitem__)


def prefix_groups(rows: Sequence[Sequence[int]], least: int) -> list[int]:
    """Number rows by what they begin with, beyond what all do; rare beginnings have number 0.

    Rows of one beginning share several tokens more than all rows; at least `least` rows make one.
    """
    common = common_prefix(rows)
    beginnings = [tuple(row[common : common + _BEGINNING]) for row in rows]
    counts = Counter(beginnings)
    often = sorted(beginning for beginning, count in counts.items() if count >= least)
    numbers = {beginning: number for number, beginning in enumerate(often, start=1)}
    return [numbers.get(beginning, 0) for beginning in beginnings]


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows begin with in common."""
    shortest = min(map(len, rows))
    first = rows[0]
    for place in range(shortest):
        if any(row[place] != first[place] for row in rows):
            return place
    return shortest


def shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with that leave each at least one of its own."""
    return min(common_prefix(prompts), min(map(len, prompts)) - 1)
