"""A raw file of questions and answers → validated, distinct examples in three splits.

One pass over the file, and a second one to leave out contradictions if there are any.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dlplora.data.raw import raw_file
from dlplora.data.scan import scan
from dlplora.errors import DataError
from dlplora.params import Keys, Splits
from dlplora.records.examples import SPLITS, Example, Split
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
    seen = scan(file, keys, splits, most_problems=_NAMED_PROBLEMS)
    if seen.num_bad and on_bad_row == "refuse":
        first, more = seen.problems[0], seen.num_bad - 1
        rest = f" (and {more} more: `dlplora validate {file}` lists them)" if more else ""
        raise DataError(f"{file}: {seen.unit} {first.item} {first.problem}{rest}")
    kept = seen.kept
    if seen.contradicting:  # what they would have displaced comes in
        again = scan(file, keys, splits, without=seen.contradicting, most_problems=0)
        kept = again.kept
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
    seen = scan(raw_file(file), keys, no_splits, most_problems=None)
    return Validation(seen.unit, seen.problems)
