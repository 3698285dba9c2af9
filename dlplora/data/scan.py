"""One pass over the raw files of a task: what is good, what is bad, which items the splits keep.

It keeps 16 bytes of each row. Every rule looks at a row, at rows of the same question or at a
whole file, never at the order of rows: shuffling changes nothing.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dlplora.data.items import BadRowError, Item, Reader
from dlplora.data.limits import ItemLimit
from dlplora.data.raw import BLANK, format_of
from dlplora.data.row_hashes import Place, RowHashes
from dlplora.data.splits import FirstPlaces, borders_of, count_by_split, places_of
from dlplora.errors import DataError
from dlplora.params.inputs import Keys, Splits
from dlplora.records.examples import SPLITS, Split
from dlplora.records.findings import Problem


@dataclass(frozen=True)
class Scan:
    """What one pass over the files found: of the problems the first ones, in order.

    `keys` are those of the first file.
    """

    keys: Keys
    num_rows: int
    num_bad: int
    problems: tuple[Problem, ...]
    num_found: dict[Split, int]
    kept: dict[Split, FirstPlaces]
    contradicting: frozenset[int]
    controls: dict[str, int]
    stripped: int


def scan(
    files: Sequence[Path],
    keys: Literal["auto"] | Keys,
    splits: Splits,
    *,
    limit: ItemLimit | None,
    without: frozenset[int] = frozenset(),
    most_problems: int | None,
) -> Scan:
    """Read files once, keeping no question whose place is in `without`.

    Each file has its own naming of fields. `controls` counts the texts that hold each control
    token, `stripped` the answers and options that ended in the base model's end token.
    """
    tally = _Tally(splits, without, most_problems)
    readers = [tally.read(file, keys, limit) for file in files]
    contradicting = tally.row_hashes.contradicting()
    tally.row_hashes.check_one_kind(tally.place, without=contradicting)
    contradictions = tally.row_hashes.contradictions(tally.place, contradicting)
    problems = sorted([*tally.problems, *contradictions])[:most_problems]
    good = tally.row_hashes.questions(without=contradicting)
    return Scan(
        keys=readers[0].settled_keys(files[0]),
        num_rows=tally.num_rows - tally.num_blank,
        num_bad=tally.num_bad + len(contradictions),
        problems=tuple(Problem(*tally.place(row), said) for row, said in problems),
        num_found=count_by_split(good, borders_of(splits)),
        kept=dict(zip(SPLITS, tally.kept, strict=True)),
        contradicting=frozenset(contradicting.tolist()),
        controls=dict(sorted(sum((reader.controls for reader in readers), Counter()).items())),
        stripped=sum(reader.stripped for reader in readers),
    )


class _Tally:
    """What has been met so far; it keeps the first `most_problems` bad rows."""

    def __init__(self, splits: Splits, without: frozenset[int], most_problems: int | None) -> None:
        self.row_hashes = RowHashes()
        self.problems: list[tuple[int, str]] = []
        self.num_rows = self.num_blank = self.num_bad = 0
        self.kept = [FirstPlaces(cap) for cap in (splits.train, splits.validation, splits.test)]
        self._first_bad: Problem | None = None  # of the file that is read
        self._files: list[Place] = []
        self._starts: list[int] = []  # the number of each file's first row
        self._borders = borders_of(splits)
        self._without = without
        self._most_problems = most_problems

    def read(self, file: Path, keys: Literal["auto"] | Keys, limit: ItemLimit | None) -> Reader:
        """Read a file; `DataError` if it holds no rows, or not one naming of their fields."""
        found = format_of(file)
        self._files.append(Place(str(file), found.unit, 1))
        self._starts.append(self.num_rows)
        reader = Reader(keys, text_cells=found.text_cells, limit=limit)
        num_blank, self._first_bad = self.num_blank, None
        for rows in found.batches(file):
            self._add(rows, reader)
        if self.num_rows - self._starts[-1] == self.num_blank - num_blank:
            raise DataError(f"{file}: holds no {found.unit}s")
        if not reader.met_objects and self._first_bad is not None:
            raise DataError(str(self._first_bad))
        reader.settled_keys(file)
        return reader

    def place(self, row: int) -> Place:
        """Return where a row, counted over all files from 0, stands."""
        number = bisect_right(self._starts, row) - 1
        return self._files[number]._replace(item=row - self._starts[number] + 1)

    def _add(self, rows: Sequence[Any], reader: Reader) -> None:
        """Take the next rows of a file."""
        items: list[Item] = []
        is_good = np.ones(len(rows), dtype=bool)
        for number, row in enumerate(rows):
            try:
                items.append(reader.item(row))
            except BadRowError as error:
                is_good[number] = False
                self._refuse(row, self.num_rows + number, str(error))
        self.num_rows += len(rows)
        places = places_of([item.question for item in items])
        self.row_hashes.add(is_good, places, items)
        validation, test = self._borders
        split = (places >= validation).astype(int) + (places >= test)
        last = np.array([first.last for first in self.kept], dtype=np.uint64)
        for number in np.flatnonzero(places <= last[split]).tolist():
            if (place := int(places[number])) not in self._without:
                self.kept[split[number]].offer(place, items[number])

    def _refuse(self, row: Any, number: int, problem: str) -> None:
        if row is BLANK:
            self.num_blank += 1
            return
        self.num_bad += 1
        self._first_bad = self._first_bad or Problem(*self.place(number), problem)
        if self._most_problems is None or len(self.problems) < self._most_problems:
            self.problems.append((number, problem))
