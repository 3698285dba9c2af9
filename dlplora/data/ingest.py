"""Raw files of questions and answers: read, checked, made distinct and split.

Items are numbered from 1. Every rule looks at an item, at items of the same question or at the
whole file, never at the order of items, so that shuffling a file changes nothing.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from dlplora.errors import DataError
from dlplora.params import Keys, Splits
from dlplora.records.examples import SPLITS, Example, Split, example_id, normalise
from dlplora.records.findings import Findings, Problem, SplitSize

KNOWN_KEYS = (("Q", "A"), ("question", "answer"), ("input", "output"))
OPTIONS_KEY, BARE_KEY = "options", "bare"
_NAMED_PROBLEMS = 100


@dataclass(frozen=True)
class Ingested:
    """The examples of a task by split, and what was met on the way."""

    examples: dict[Split, list[Example]]
    findings: Findings


@dataclass(frozen=True)
class _Checked:
    """The good items of a file by their number, and the problems of the bad ones."""

    keys: Keys
    items: dict[int, Example]
    problems: list[Problem]
    num_items: int


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
    `on_bad_row` is "skip", on the first bad item.
    """
    file = raw_file(raw)
    checked = _check_file(file, task, keys)
    if checked.problems and on_bad_row == "refuse":
        first, more = checked.problems[0], len(checked.problems) - 1
        rest = f" (and {more} more: `dlplora validate {file}` lists them)" if more else ""
        raise DataError(f"{file}: item {first.item} {first.problem}{rest}")
    examples = _unite(checked.items.values())
    by_split, found = _split(examples, splits)
    for (split, kept), least in zip(by_split.items(), splits.least, strict=True):
        if len(kept) < least:
            raise DataError(
                f"{file}: {len(kept)} of {len(examples)} distinct questions fell into the "
                f"{split} split, at least {least} are needed; add items or lower splits.least"
            )
    findings = Findings(
        task=task,
        raw=str(raw),
        kind=examples[0].kind,
        keys={name: value for name, value in checked.keys.model_dump().items() if value},
        read=checked.num_items,
        distinct=len(examples),
        united=len(checked.items) - len(examples),
        skipped=len(checked.problems),
        problems=tuple(checked.problems[:_NAMED_PROBLEMS]),
        splits={name: SplitSize(found[name], len(by_split[name])) for name in SPLITS},
        longest_question_chars=max(len(example.question) for example in examples),
        longest_answer_chars=max(len(a) for example in examples for a in example.answers),
        most_answers=max(len(example.answers) for example in examples),
    )
    return Ingested(by_split, findings)


def validate(file: Path, *, keys: Literal["auto"] | Keys) -> list[Problem]:
    """Return every problem of a raw file's items; `DataError` if it cannot be read at all."""
    return _check_file(file, "validated", keys).problems


def raw_file(raw: Path) -> Path:
    """Return the one file of a task's raw folder, or the file itself."""
    if not raw.is_dir():
        return raw
    files = sorted(path for path in raw.iterdir() if path.suffix == ".json")
    if len(files) != 1:
        raise DataError(f"{raw}: found {len(files)} .json files, expected one")
    return files[0]


def _check_file(file: Path, task: str, keys: Literal["auto"] | Keys) -> _Checked:
    rows = _read_rows(file)
    keys = _find_keys(file, rows) if keys == "auto" else keys
    items: dict[int, Example] = {}
    problems = []
    for number, row in enumerate(rows, start=1):
        try:
            items[number] = _row_to_example(row, task, keys)
        except BadItemError as error:
            problems.append(Problem(number, str(error)))
    for number, problem in _contradictions(items):
        del items[number]
        problems.append(Problem(number, problem))
    if len(kinds := {example.kind for example in items.values()}) == 2:
        first = {kind: next(n for n, item in items.items() if item.kind == kind) for kind in kinds}
        raise DataError(
            f"{file}: item {first['mcq']} has options and item {first['qa']} has none; "
            f"a task is either multiple choice or free answers: make two tasks"
        )
    if not items and not problems:
        raise DataError(f"{file}: the list is empty")
    return _Checked(keys, items, sorted(problems, key=lambda p: p.item), len(rows))


def _read_rows(file: Path) -> list[Any]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    try:
        rows = orjson.loads(content.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f'{file}: found {_kind(rows)}, expected a list of {{"Q": …, "A": …}}')
    return rows


def _find_keys(file: Path, rows: Sequence[Any]) -> Keys:
    """Name the fields by the keys of all items; any case is recognised."""
    keys = dict.fromkeys(str(key) for row in rows if isinstance(row, dict) for key in row)
    folded = {key.casefold(): key for key in sorted(keys, reverse=True)}
    pairs = [
        (folded[question.casefold()], folded[answer.casefold()])
        for question, answer in KNOWN_KEYS
        if question.casefold() in folded and answer.casefold() in folded
    ]
    if len(pairs) == 1:
        question, answer = pairs[0]
        return Keys(question=question, answer=answer, options=folded.get(OPTIONS_KEY))
    known = " or ".join(f"{question}/{answer}" for question, answer in KNOWN_KEYS)
    found = ", ".join(keys) or "no object at all"
    raise DataError(
        f"{file}: found the keys {found}; expected one pair of {known}, "
        f"or name them in params.yaml: tasks.<task>.keys"
    )


class BadItemError(Exception):
    """What is wrong with one item, to follow "item 17 "."""


def _row_to_example(row: Any, task: str, keys: Keys) -> Example:
    if not isinstance(row, dict):
        raise BadItemError(f"is {_kind(row)}, expected an object")
    question = _text(row, keys.question)
    answers = _texts(row, keys.answer)
    options = None
    if keys.options is not None and row.get(keys.options) is not None:
        options = _texts(row, keys.options)
        if len(options) < 2 or len(set(options)) < len(options):
            raise BadItemError(f"has the options {options}, expected at least two, all different")
        if wrong := [answer for answer in answers if answer not in options]:
            raise BadItemError(f"has the answer {wrong[0]!r}, which is not among its options")
    bare = row.get(BARE_KEY)
    return Example(
        id=example_id(task, question),
        task=task,
        question=question,
        answers=tuple(sorted(set(answers))),
        options=None if options is None else tuple(options),
        bare=bare if isinstance(bare, str) else None,
    )


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise BadItemError(f"has no {key!r} (keys: {', '.join(row) or 'none'})")
    return _checked_text(row[key], key)


def _texts(row: dict[str, Any], key: str) -> list[str]:
    value = row.get(key)
    if not isinstance(value, list):
        return [_text(row, key)]
    if not value:
        raise BadItemError(f"has an empty list as {key!r}")
    return [_checked_text(text, key) for text in value]


def _checked_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadItemError(f"has {_kind(value)} as {key!r}, expected a string")
    if not value.strip():
        raise BadItemError(f"has an empty {key!r}")
    if "\0" in value:
        raise BadItemError(f"has a NUL character in {key!r}")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def _contradictions(items: dict[int, Example]) -> list[tuple[int, str]]:
    """Find multiple-choice items of one question that differ in options or answers."""
    groups: dict[str, list[int]] = {}
    for number, item in items.items():
        groups.setdefault(item.id, []).append(number)
    bad = []
    for numbers in groups.values():
        said = {n: (frozenset(items[n].options or ()), items[n].answers) for n in numbers}
        if len(set(said.values())) > 1 and any(items[n].options for n in numbers):
            for number in numbers:
                other = next(n for n in numbers if said[n] != said[number])
                bad.append((number, f"contradicts item {other}: same question, other answers"))
    return bad


def _unite(items: Iterable[Example]) -> list[Example]:
    """Make one example of the items of each question, with all their answers."""
    groups: dict[str, list[Example]] = {}
    for item in items:
        groups.setdefault(item.id, []).append(item)
    return [
        Example(
            id=identity,
            task=group[0].task,
            question=min(item.question for item in group),
            answers=tuple(sorted({answer for item in group for answer in item.answers})),
            options=min((item.options for item in group if item.options), default=None),
            bare=min((item.bare for item in group if item.bare), default=None),
        )
        for identity, group in groups.items()
    ]


def _split(
    examples: Iterable[Example], splits: Splits
) -> tuple[dict[Split, list[Example]], dict[Split, int]]:
    """Deal examples to splits by the hash of the question, and cap each in hash order."""
    train, validation, _ = splits.shares
    dealt: dict[Split, list[tuple[float, Example]]] = {split: [] for split in SPLITS}
    for example in examples:
        place = hash_place(example.question)
        split = SPLITS[(place >= train) + (place >= train + validation)]
        dealt[split].append((place, example))
    ordered = {
        split: [example for _, example in sorted(part, key=lambda pair: (pair[0], pair[1].id))]
        for split, part in dealt.items()
    }
    caps = dict(zip(SPLITS, (splits.train, splits.validation, splits.test), strict=True))
    kept = {split: ordered[split][: caps[split]] for split in SPLITS}
    return kept, {split: len(ordered[split]) for split in SPLITS}


def hash_place(question: str) -> float:
    """Map a question to [0, 1) by the hash of its normalised form."""
    digest = hashlib.sha256(normalise(question).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
