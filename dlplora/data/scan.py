"""One pass over a raw file: what is good, what is bad, and which items the splits keep.

It keeps 16 bytes of each row. Every rule looks at a row, at rows of the same question or at the
whole file, never at the order of rows: shuffling changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dlplora.data.items import BadRowError, Item, Reader
from dlplora.data.limits import ItemLimit
from dlplora.data.raw import BLANK, format_of
from dlplora.data.row_hashes import RowHashes
from dlplora.data.splits import FirstPlaces, borders_of, count_by_split, places_of
from dlplora.errors import DataError
from dlplora.params.inputs import Keys, Splits
from dlplora.records.examples import SPLITS, Split
from dlplora.records.findings import Problem


@dataclass(frozen=True)
class Scan:
    """What one pass over a file found: of the problems the first ones, sorted."""

    unit: str
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
    file: Path,
    keys: Literal["auto"] | Keys,
    splits: Splits,
    *,
    limit: ItemLimit | None,
    without: frozenset[int] = frozenset(),
    most_problems: int | None,
) -> Scan:
    """Read a file once, keeping no question whose place is in `without`.

    `controls` counts the texts that hold each control token, `stripped` the answers and options
    that ended in the base model's end token.
    """
    found = format_of(file)
    reader = Reader(keys, text_cells=found.text_cells, limit=limit)
    tally = _Tally(splits, without, most_problems)
    for rows in found.batches(file):
        tally.add(rows, reader)
    if tally.num_rows == tally.num_blank:
        raise DataError(f"{file}: holds no {found.unit}s")
    if not reader.met_objects:
        first = tally.problems[0]
        raise DataError(f"{file}: {found.unit} {first.item} {first.problem}")
    settled = reader.settled_keys(file)
    contradicting = tally.row_hashes.contradicting()
    tally.row_hashes.check_one_kind(file, found.unit, without=contradicting)
    contradictions = tally.row_hashes.contradictions(found.unit, contradicting)
    problems = sorted([*tally.problems, *contradictions], key=lambda problem: problem.item)
    good = tally.row_hashes.questions(without=contradicting)
    return Scan(
        unit=found.unit,
        keys=settled,
        num_rows=tally.num_rows - tally.num_blank,
        num_bad=tally.num_bad + len(contradictions),
        problems=tuple(problems[:most_problems]),
        num_found=count_by_split(good, borders_of(splits)),
        kept=dict(zip(SPLITS, tally.kept, strict=True)),
        contradicting=frozenset(contradicting.tolist()),
        controls=dict(sorted(reader.controls.items())),
        stripped=reader.stripped,
    )


class _Tally:
    """What has been met so far; it keeps the first `most_problems` bad rows."""

    def __init__(self, splits: Splits, without: frozenset[int], most_problems: int | None) -> None:
        self.row_hashes = RowHashes()
        self.problems: list[Problem] = []
        self.num_rows = self.num_blank = self.num_bad = 0
        self.kept = [FirstPlaces(cap) for cap in (splits.train, splits.validation, splits.test)]
        self._borders = borders_of(splits)
        self._without = without
        self._most_problems = most_problems

    def add(self, rows: Sequence[Any], reader: Reader) -> None:
        """Take the next rows of the file."""
        items: list[Item] = []
        is_good = np.ones(len(rows), dtype=bool)
        for number, row in enumerate(rows):
            try:
                items.append(reader.item(row))
            except BadRowError as error:
                is_good[number] = False
                self._refuse(row, Problem(self.num_rows + number + 1, str(error)))
        self.num_rows += len(rows)
        places = places_of([item.question for item in items])
        self.row_hashes.add(is_good, places, items)
        validation, test = self._borders
        split = (places >= validation).astype(int) + (places >= test)
        last = np.array([first.last for first in self.kept], dtype=np.uint64)
        for number in np.flatnonzero(places <= last[split]).tolist():
            if (place := int(places[number])) not in self._without:
                self.kept[split[number]].offer(place, items[number])

    def _refuse(self, row: Any, problem: Problem) -> None:
        if row is BLANK:
            self.num_blank += 1
            return
        self.num_bad += 1
        if self._most_problems is None or len(self.problems) < self._most_problems:
            self.problems.append(problem)
