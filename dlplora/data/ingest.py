"""A raw file of questions and answers → validated, distinct examples in three splits.

One pass over the file – a second one to leave out contradictions – that keeps 16 bytes of each row.
Every rule looks at a row, at rows of the same question or at the whole file, never at the order of
rows: shuffling changes nothing.
"""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dlplora.data.census import Census
from dlplora.data.items import BadRowError, Reader
from dlplora.data.raw import BLANK, format_of, raw_file
from dlplora.data.splits import FirstPlaces, borders_of, count_by_split, place_of
from dlplora.errors import DataError
from dlplora.params import Keys, Splits
from dlplora.records.examples import SPLITS, Example, Split, normalise
from dlplora.records.findings import Findings, Problem, SplitSize

_NAMED_PROBLEMS = 100


@dataclass(frozen=True)
class Ingested:
    """The examples of a task by split, and what was met on the way."""

    examples: dict[Split, list[Example]]
    findings: Findings


@dataclass(frozen=True)
class Validation:
    """Every problem of a raw file; `unit` is what its format calls a row."""

    unit: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _Seen:
    """What one pass over a file found: of the problems the first ones, sorted."""

    unit: str
    keys: Keys
    num_rows: int
    num_bad: int
    problems: tuple[Problem, ...]
    num_found: dict[Split, int]
    kept: dict[Split, FirstPlaces]
    contradicting: frozenset[int]


def ingest(
    raw: Path,
    task: str,
    *,
    keys: Literal["auto"] | Keys,
    on_bad_row: Literal["refuse", "skip"],
    splits: Splits,
) -> Ingested:
    """Read a task's raw file into validated, distinct examples in three splits.

    Raises `DataError` on a file that cannot be read, too few items for a split, and, unless
    `on_bad_row` is "skip", on the first bad row.
    """
    file = raw_file(raw)
    seen = _read(file, keys, splits)
    if seen.num_bad and on_bad_row == "refuse":
        first, more = seen.problems[0], seen.num_bad - 1
        rest = f" (and {more} more: `dlplora validate {file}` lists them)" if more else ""
        raise DataError(f"{file}: {seen.unit} {first.item} {first.problem}{rest}")
    kept = seen.kept
    if seen.contradicting:  # what they would have displaced comes in
        kept = _read(file, keys, splits, without=seen.contradicting).kept
    examples = {split: places.examples(task) for split, places in kept.items()}
    num_distinct = sum(seen.num_found.values())
    for (split, part), least in zip(examples.items(), splits.least, strict=True):
        if len(part) < least:
            raise DataError(
                f"{file}: {len(part)} of {num_distinct} distinct questions fell into the "
                f"{split} split, at least {least} are needed; add items or lower splits.least"
            )
    every = [example for part in examples.values() for example in part]
    findings = Findings(
        task=task,
        raw=str(raw),
        kind=every[0].kind,
        keys={name: value for name, value in seen.keys.model_dump().items() if value},
        unit=seen.unit,
        read=seen.num_rows,
        distinct=num_distinct,
        united=seen.num_rows - seen.num_bad - num_distinct,
        skipped=seen.num_bad,
        problems=seen.problems,
        splits={name: SplitSize(seen.num_found[name], len(examples[name])) for name in SPLITS},
        longest_question_chars=max(len(example.question) for example in every),
        longest_answer_chars=max(len(a) for example in every for a in example.answers),
        most_answers=max(len(example.answers) for example in every),
    )
    return Ingested(examples, findings)


def validate(file: Path, *, keys: Literal["auto"] | Keys) -> Validation:
    """Return every problem of a raw file's rows; `DataError` if it cannot be read at all."""
    no_splits = Splits(train=1, validation=1, test=1, shares=(1, 0, 0), least=(1, 1, 1))
    seen = _read(raw_file(file), keys, no_splits, most_problems=None)
    return Validation(seen.unit, seen.problems)


def _read(
    file: Path,
    keys: Literal["auto"] | Keys,
    splits: Splits,
    *,
    without: frozenset[int] = frozenset(),
    most_problems: int | None = _NAMED_PROBLEMS,
) -> _Seen:
    """Read a file once, keeping no question whose place is in `without`."""
    rows = format_of(file)
    reader = Reader(keys, text_cells=rows.text_cells)
    census = Census()
    sizes = (splits.train, splits.validation, splits.test)
    kept = tuple(FirstPlaces(size) for size in sizes)
    borders = borders_of(splits)
    problems: list[Problem] = []
    num_blank = num_bad = number = 0
    for number, row in enumerate(rows.rows(file), start=1):
        try:
            item = reader.item(row)
        except BadRowError as error:
            census.add_none()
            if row is BLANK:
                num_blank += 1
                continue
            num_bad += 1
            if most_problems is None or len(problems) < most_problems:
                problems.append(Problem(number, str(error)))
            continue
        question = normalise(item.question)
        place = place_of(question)
        census.add(place, item)
        first = kept[bisect_right(borders, place)]
        if place <= first.last and place not in without:
            first.offer(place, question, item)
    if number == num_blank:
        raise DataError(f"{file}: holds no {rows.unit}s")
    if not reader.met_objects:
        raise DataError(f"{file}: {rows.unit} {problems[0].item} {problems[0].problem}")
    settled = reader.settled_keys(file)
    contradicting = census.contradicting()
    census.check_one_kind(file, rows.unit, without=contradicting)
    contradictions = census.contradictions(rows.unit, contradicting)
    problems = sorted([*problems, *contradictions], key=lambda problem: problem.item)
    good = census.questions(without=contradicting)
    return _Seen(
        unit=rows.unit,
        keys=settled,
        num_rows=number - num_blank,
        num_bad=num_bad + len(contradictions),
        problems=tuple(problems[:most_problems]),
        num_found=count_by_split(good, borders),
        kept=dict(zip(SPLITS, kept, strict=True)),
        contradicting=frozenset(contradicting.tolist()),
    )
