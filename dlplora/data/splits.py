"""Splits by the hash of the question: adding rows never moves an old row to another one."""

import hashlib
import math
from bisect import bisect_left
from collections.abc import Collection, Sequence
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from dlplora.data.items import Item
from dlplora.data.normalize import normalise_all
from dlplora.params.inputs import Splits
from dlplora.records.examples import SPLITS, Example, Split, example_id, normalise

NUM_PLACES = 2**64


def places_of(questions: Sequence[str]) -> NDArray[np.uint64]:
    """Return the place of each question among 2**64: the first bytes of its text's SHA-256.

    The text is the normalised question; none may hold a NUL character.
    """
    digests = b"".join([hashlib.sha256(text).digest() for text in normalise_all(questions)])
    return np.frombuffer(digests, dtype=">u8")[::4].astype(np.uint64)


def borders_of(splits: Splits) -> tuple[int, int]:
    """Return the places at which the validation split and the test split begin."""
    train, validation, _ = splits.shares
    return math.ceil(train * NUM_PLACES), math.ceil((train + validation) * NUM_PLACES)


def count_by_split(places: NDArray[np.uint64], borders: tuple[int, int]) -> dict[Split, int]:
    """Count sorted places by the split that they fall into."""
    ends = [*(bisect_left(places, border) for border in borders), len(places)]
    return {split: end - start for split, start, end in zip(SPLITS, [0, *ends], ends, strict=False)}


class FirstPlaces:
    """The items of the first `cap` questions by place, of all that were offered.

    A question that is dropped is behind all that stay, so that every item of a kept question is
    here, wherever in the file it stood.
    """

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._items: dict[tuple[int, str], set[Item]] = {}
        self._behind: list[tuple[int, str]] = []  # the last place on top, as negative numbers
        self.last = NUM_PLACES - 1  # what is behind this place is not kept

    def __len__(self) -> int:
        return len(self._items)

    def offer(self, place: int, item: Item) -> None:
        """Keep an item if its question is among the first so far."""
        if place > self.last:
            return
        key = (-place, normalise(item.question))
        if key not in self._items:
            self._items[key] = set()
            heappush(self._behind, key)
        self._items[key].add(item)
        if len(self._items) > self._cap:
            del self._items[heappop(self._behind)]
            self.last = -self._behind[0][0]

    def examples(self, task: str) -> list[Example]:
        """Return one example for each question, with all its answers, in the order of places."""
        placed = [(-place, _merged(task, items)) for (place, _), items in self._items.items()]
        placed.sort(key=lambda pair: (pair[0], pair[1].id))
        return [example for _, example in placed]


def _merged(task: str, items: Collection[Item]) -> Example:
    """Make one example of the items of a question."""
    question = min(item.question for item in items)
    return Example(
        id=example_id(task, question),
        task=task,
        question=question,
        answers=tuple(sorted({answer for item in items for answer in item.answers})),
        options=min((item.options for item in items if item.options), default=None),
        bare=min((item.bare for item in items if item.bare), default=None),
    )
