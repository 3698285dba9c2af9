"""Other wordings of a task's questions: templates with a slot for the bare question."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from dlplora.data.limits import ItemLimit
from dlplora.errors import DataError, ParamsError
from dlplora.params.fields import Section, checked
from dlplora.params.wordings import SLOT, NoTask, Wordings
from dlplora.params.yaml import read_yaml
from dlplora.records.examples import Example, Split, normalise

M = TypeVar("M", bound=Section)


def apply_wordings(
    wordings: Wordings, examples: Iterable[Example], split: Split, *, limit: ItemLimit
) -> list[Example]:
    """Give each example of a split one of its wordings, drawn by a hash.

    A new wording moves only the examples that it takes. Where there is none, or the item
    would be too long with it, an example stays without.
    """
    templates: list[str] = getattr(wordings, split)
    return [_reworded(example, templates, limit) for example in examples]


def read_wordings(file: Path) -> Wordings:
    """Read a file of wordings; `ParamsError` says what is wrong with it."""
    return _read(Wordings, file, "a file of wordings")


def read_no_task(file: Path) -> NoTask:
    """Read a file of texts that belong to no task; `ParamsError` says what is wrong with it."""
    return _read(NoTask, file, "texts of no task")


def _read(kind: type[M], file: Path, expected: str) -> M:
    try:
        return checked(kind, read_yaml(file), str(file))
    except FileNotFoundError as error:
        raise ParamsError(f"{file}: not there; expected {expected}") from error


def _reworded(example: Example, templates: Sequence[str], limit: ItemLimit) -> Example:
    if not templates:
        return example
    template = max(templates, key=lambda one: _hash(one, example.id))
    question = template.replace(SLOT, example.bare or example.question)
    is_long = limit.problem(question, (*example.answers, *(example.options or ())))
    return replace(example, reworded=None if is_long else question)


def asked(examples: Sequence[Example], *, share: float) -> list[Example]:
    """Return the examples, a share of them asked in the other wording that they have.

    Which ones is decided by a hash: the same at every call, whatever other examples there are.
    """
    return [
        replace(example, question=example.reworded)
        if example.reworded is not None and _hash("asked", example.id) < share * 2**64
        else example
        for example in examples
    ]


def check_distinct(examples: Mapping[str, Sequence[Example]]) -> None:
    """Raise `DataError` if a wording makes a question that another task has, too."""
    owner: dict[str, str] = {}
    for task in sorted(examples):
        for example in examples[task]:
            owner.setdefault(normalise(example.question), task)
    for task in sorted(examples):
        for example in examples[task]:
            if example.reworded is None:
                continue
            other = owner.setdefault(normalise(example.reworded), task)
            if other != task:
                raise DataError(
                    f"the wordings of {task} make the question {example.reworded[:80]!r}, which "
                    f"{other} has, too; change the wording, or leave it out"
                )


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")
