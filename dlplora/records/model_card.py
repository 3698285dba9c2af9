"""Models: what the stage `model` writes, and what a registered version adds to it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from dlplora.errors import ModelError, unreadable
from dlplora.records.examples import Split
from dlplora.records.files import read_json, read_table, record_of, write_json, write_table
from dlplora.records.verdict import Decision, Judgement

MODEL_FILE = "model.json"
ITEMS_FILE = "items.parquet"
CALIBRATION_FILE = "calibration.parquet"
_ITEMS = pa.schema(
    [(name, pa.string()) for name in ("task", "split", "question_sha256", "answers_sha256")]
)


@dataclass(frozen=True)
class TaskData:
    """How many examples of a task there are in each split, and the hash of them all.

    `labels` are the options of all its examples, or nothing if they have none or different ones.
    """

    train: int
    validation: int
    test: int
    sha256: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelCard:
    """What a model is made of: the base model's fingerprint, its default system, its tasks."""

    base: str
    system: str
    tasks: dict[str, TaskData]


@dataclass(frozen=True)
class SplitItem:
    """A question of a model's data: its task and split, the hashes of its text and answers."""

    task: str
    split: Split
    question_sha256: str
    answers_sha256: str


@dataclass(frozen=True)
class VersionCard:
    """What git keeps of a registered model.

    `scores` are those of data/metrics.json, by setting and system, and `score` is that of the
    default system. `inputs` hashes all that the retrain began with, `base_md5` and `model_md5` are
    DVC's hashes of data/base and data/model. The first version has no `verdict`.
    """

    created: str
    suite: str
    score: float
    scores: dict[str, dict[str, float]]
    card: ModelCard
    inputs: str
    base_md5: str
    model_md5: str
    verdict: Judgement | None
    decision: Decision


def write_items(folder: Path, items: Sequence[SplitItem]) -> None:
    """Write which questions a model was trained, validated and tested on."""
    write_table(folder / ITEMS_FILE, [asdict(item) for item in items], _ITEMS)


def read_items(folder: Path) -> list[SplitItem]:
    """Read which questions a model was trained, validated and tested on."""
    with _readable(folder):
        return record_of(list[SplitItem], read_table(folder / ITEMS_FILE))


def write_model_card(folder: Path, card: ModelCard) -> None:
    """Write the card of a model."""
    write_json(folder / MODEL_FILE, asdict(card))


def read_model_card(folder: Path) -> ModelCard:
    """Read the card of a model; `ModelError` if there is none."""
    with _readable(folder):
        return record_of(ModelCard, read_json(folder / MODEL_FILE))


def read_version_name(folder: Path) -> str:
    """Read which version a checkout is; `ModelError` if it is none."""
    with _readable(folder):
        return str(read_json(folder / MODEL_FILE)["version"])


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: no model of this project: {unreadable(error)}") from error


def version_card_of(values: Any) -> VersionCard:
    """Make the card of a version of what its file holds."""
    return record_of(VersionCard, values)
