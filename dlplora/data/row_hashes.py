"""What ingest remembers of every row of a task: 16 bytes, a hash of its question and of its choice.

Two questions of one 64-bit hash would count as one: among a million rows with odds of 1 : 10⁷.
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dlplora.data.items import Item
from dlplora.errors import DataError

Hashes = NDArray[np.uint64]
_NONE, _FREE, _CHOICE = 0, 1, 2


class Place(NamedTuple):
    """Where a row stands: its file, what the format calls a row, its number from 1."""

    file: str
    unit: str
    item: int

    def beside(self, other: "Place") -> str:
        """Name the row in a message about another one."""
        of = "" if self.file == other.file else f" of {self.file}"
        return f"{self.unit} {self.item}{of}"


class RowHashes:
    """The hashes of all rows, in the order of the files; a row that is no good item has none."""

    def __init__(self) -> None:
        self._questions = array("Q")
        self._choices = array("Q")

    def add(self, is_good: NDArray[np.bool_], places: Hashes, items: Sequence[Item]) -> None:
        """Remember the next rows: which are good, the places of their questions, their items."""
        questions = np.zeros(len(is_good), dtype=np.uint64)
        questions[is_good] = places
        choices = np.full(len(is_good), _NONE, dtype=np.uint64)
        choices[is_good] = [_FREE if i.options is None else _choice_hash(i) for i in items]
        self._questions.frombytes(questions.tobytes())
        self._choices.frombytes(choices.tobytes())

    def questions(self, *, without: Hashes) -> Hashes:
        """Return the distinct hashes of the questions of good rows, sorted, but for some."""
        questions, choices = self._arrays()
        distinct = questions[choices != _NONE]
        distinct.sort()  # np.unique would keep a set of them all
        is_first = np.ones(len(distinct), dtype=bool)
        np.not_equal(distinct[1:], distinct[:-1], out=is_first[1:])
        distinct = distinct[is_first]
        return np.setdiff1d(distinct, without, assume_unique=True) if without.size else distinct

    def check_one_kind(self, place: Callable[[int], Place], *, without: Hashes) -> None:
        """Raise `DataError` if some rows have options and some have none, but for questions.

        `place` tells where the row of a number, counted from 0, stands.
        """
        questions, choices = self._arrays()
        counts = ~np.isin(questions, without)
        has_options, has_none = counts & (choices >= _CHOICE), counts & (choices == _FREE)
        if has_options.any() and has_none.any():
            one, other = place(int(has_options.argmax())), place(int(has_none.argmax()))
            raise DataError(
                f"{one.file}: {one.unit} {one.item} has options and {other.beside(one)} has none; "
                f"a task is either multiple choice or free answers: make two tasks"
            )

    def contradicting(self) -> Hashes:
        """Return the questions that stand with different options or answers to choose."""
        questions, choices = self._arrays()
        if not (choices >= _CHOICE).any():
            return np.empty(0, dtype=np.uint64)
        order = np.lexsort((choices, questions))  # bad rows before all of their hash
        in_order = choices[order]
        differ = (in_order[1:] != in_order[:-1]) & (in_order[:-1] != _NONE)
        del in_order  # one array of a file's length at a time
        in_order = questions[order]
        differ &= in_order[1:] == in_order[:-1]
        return np.unique(in_order[1:][differ])

    def contradictions(
        self, place: Callable[[int], Place], questions: Hashes
    ) -> list[tuple[int, str]]:
        """Name the rows of contradicting questions, and say which other row each contradicts."""
        mine, choices = self._arrays()
        rows: dict[int, list[int]] = {}
        for row in np.nonzero(np.isin(mine, questions) & (choices != _NONE))[0].tolist():
            rows.setdefault(int(mine[row]), []).append(row)
        problems = []
        for group in rows.values():
            first = group[0]
            second = next(row for row in group if choices[row] != choices[first])
            for row in group:
                other = place(second if choices[row] == choices[first] else first)
                said = f"contradicts {other.beside(place(row))}: same question, other answers"
                problems.append((row, said))
        return sorted(problems)

    def _arrays(self) -> tuple[Hashes, Hashes]:
        return (
            np.frombuffer(self._questions, dtype=np.uint64),
            np.frombuffer(self._choices, dtype=np.uint64),
        )


def _choice_hash(item: Item) -> int:
    """Hash the options, in any order, and the answers of a row."""
    told = repr((sorted(item.options or ()), item.answers)).encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "big") | _CHOICE
