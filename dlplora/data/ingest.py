"""Raw files of questions and answers → validated, distinct examples in three splits.

One pass over the files, and a second one to leave out contradictions if there are any.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from dlplora.data.limits import ItemLimit
from dlplora.data.raw import raw_files
from dlplora.data.scan import Scan, scan
from dlplora.data.splits import FirstPlaces
from dlplora.errors import DataError
from dlplora.params.inputs import Keys, Splits
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
    """Every problem of a raw file's rows, and of the file as a whole.

    `notes` tell of what is read otherwise than it may look.
    """

    problems: tuple[Problem, ...]
    whole: str | None
    notes: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Tell whether a task can be made of the file."""
        return not self.problems and self.whole is None


def ingest(
    raw: Path,
    task: str,
    *,
    keys: Literal["auto"] | Keys,
    on_bad_row: Literal["refuse", "skip"],
    splits: Splits,
    limit: ItemLimit | None,
    more: Sequence[Path] = (),
) -> Ingested:
    """Read a task's raw files into validated, distinct examples in three splits.

    `raw` and each of `more` is a file, or a folder of files.

    Without a `limit` nothing is known of the base model, and no item is too long.

    Raises `DataError` on a file that cannot be read, too few items for a split, and, unless
    `on_bad_row` is "skip", on the first bad row.
    """
    files = raw_files(raw, *more)
    scanned = partial(scan, files, keys, splits, limit=limit)
    seen = scanned(most_problems=_NAMED_PROBLEMS)
    if seen.num_bad and on_bad_row == "refuse":
        first, left = seen.problems[0], seen.num_bad - 1
        hint = f": `dlplora validate {first.file}` lists them" if len(files) == 1 else ""
        rest = f" (and {left} more{hint})" if left else ""
        raise DataError(f"{first}{rest}")
    kept = _kept(seen, scanned)
    if problem := _too_few(seen, kept, splits):
        raise DataError(f"{', '.join(map(str, files))}: {problem}")
    examples = {split: places.examples(task) for split, places in kept.items()}
    num_distinct = sum(seen.num_found.values())
    every = [example for part in examples.values() for example in part]
    findings = Findings(
        task=task,
        files=tuple(map(str, files)),
        kind=every[0].kind,
        keys={name: value for name, value in seen.keys.model_dump().items() if value},
        read=seen.num_rows,
        distinct=num_distinct,
        merged=seen.num_rows - seen.num_bad - num_distinct,
        skipped=seen.num_bad,
        problems=seen.problems,
        splits={name: SplitSize(seen.num_found[name], len(examples[name])) for name in SPLITS},
        longest_question_chars=max(len(example.question) for example in every),
        longest_answer_chars=max(len(a) for example in every for a in example.answers),
        most_answers=max(len(example.answers) for example in every),
        controls=seen.controls,
        stripped=seen.stripped,
    )
    return Ingested(examples, findings)


def validate(
    raw: Path, *, keys: Literal["auto"] | Keys, splits: Splits, limit: ItemLimit | None
) -> Validation:
    """Return every problem of a raw file: a file without any is one that `ingest` takes.

    Raises `DataError` if it cannot be read at all.
    """
    scanned = partial(scan, raw_files(raw), keys, splits, limit=limit)
    seen = scanned(most_problems=None)
    whole = _too_few(seen, _kept(seen, scanned), splits)
    return Validation(seen.problems, whole, tuple(told(seen.controls, seen.stripped)))


def told(controls: Mapping[str, int], stripped: int) -> list[str]:
    """Tell of control tokens and end tokens in texts, a line each."""
    lines = [f"{n} texts hold {token}, read as plain text" for token, n in controls.items()]
    if stripped:
        lines.append(f"{stripped} answers and options end in the end token, which is left out")
    return lines


def _kept(seen: Scan, scanned: Callable[..., Scan]) -> dict[Split, FirstPlaces]:
    """Return the kept items; without contradictions, what they would have displaced comes in."""
    if not seen.contradicting:
        return seen.kept
    return scanned(without=seen.contradicting, most_problems=0).kept


def _too_few(seen: Scan, kept: Mapping[Split, FirstPlaces], splits: Splits) -> str | None:
    """Say which split has too few items, if one has, or that no item is good."""
    if not any(kept.values()) and seen.problems:
        first = seen.problems[0]
        return (
            f"all {seen.num_bad} rows are bad, the first: {first.unit} {first.item} {first.problem}"
        )
    for split, least in zip(SPLITS, splits.least, strict=True):
        if len(kept[split]) < least:
            return (
                f"{len(kept[split])} of {sum(seen.num_found.values())} distinct questions fell "
                f"into the {split} split, at least {least} are needed; add items or lower "
                f"splits.least"
            )
    return None
