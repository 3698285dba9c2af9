"""Examples: questions with their answers, as every stage after ingest sees them."""

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from dlplora.errors import ParamsError, choices
from dlplora.records.files import read_table, record_of, write_table
from dlplora.words import Primary

Split = Literal["train", "validation", "test"]
Kind = Literal["mcq", "qa"]
# Which metrics can be the primary one of a kind of task.
PRIMARIES: dict[Kind, tuple[Primary, ...]] = {
    "mcq": ("accuracy", "exact_match"),
    "qa": ("bleu", "exact_match", "rougeL"),
}
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_TEXTS = pa.list_(pa.string())
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("answers", _TEXTS),
        ("options", _TEXTS),
        ("bare", pa.string()),
        ("reworded", pa.string()),
    ]
)


@dataclass(frozen=True)
class Example:
    """One question with its answers.

    `options` makes it multiple choice; `bare` is the question without the task's template
    where the source tells the two apart, `reworded` the bare question in another wording.
    """

    id: str
    task: str
    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...] | None
    bare: str | None
    reworded: str | None = None

    @property
    def kind(self) -> Kind:
        """Multiple choice or free answer."""
        return "qa" if self.options is None else "mcq"


def check_primary(primary: Primary, kind: Kind, *, task: str) -> None:
    """Raise `ParamsError` if a primary metric does not fit the kind of a task."""
    if primary not in PRIMARIES[kind]:
        title = "multiple choice" if kind == "mcq" else "free answers"
        raise ParamsError(
            f"params.yaml: tasks.{task}.primary is {primary}, but the task has {title}; "
            f"expected one of {choices(PRIMARIES[kind])}"
        )


def normalise(question: str) -> str:
    """Return what tells questions apart: NFC, and one blank for all white space."""
    return " ".join(unicodedata.normalize("NFC", question).split())


def example_id(task: str, question: str) -> str:
    """Return the hash that names an example: of its task and normalised question."""
    return hashlib.sha256(f"{task}\0{normalise(question)}".encode()).hexdigest()


def examples_path(folder: Path, split: Split, task: str) -> Path:
    """Return where the examples of a task's split stand."""
    return folder / split / f"{task}.parquet"


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write the examples of one task and split."""
    write_table(path, [asdict(example) for example in examples], _SCHEMA)


def read_examples(path: Path) -> list[Example]:
    """Read the examples of one task and split."""
    return record_of(list[Example], read_table(path))
