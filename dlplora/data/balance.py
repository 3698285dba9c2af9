"""Balanced router data: the same number of questions from every task."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from dlplora.data.wordings import asked, check_distinct
from dlplora.params.routing import Balance
from dlplora.records.examples import Example
from dlplora.records.files import read_table, record_of, write_table, written_folder

_LABELLED = pa.schema([("text", pa.string()), ("task", pa.string())])


@dataclass(frozen=True)
class Labelled:
    """A text with the task that it belongs to."""

    text: str
    task: str


@dataclass(frozen=True)
class RouterData:
    """What routers learn from and are stopped by."""

    train: list[Labelled]
    validation: list[Labelled]


def balance(
    train: Mapping[str, Sequence[Example]],
    validation: Mapping[str, Sequence[Example]],
    *,
    params: Balance,
    seed: int,
) -> RouterData:
    """Draw router data from the examples of each task.

    Every task contributes exactly `per_task` texts to training and `validation_per_task` to
    validation. Raises `DataError` if wordings make the same question of two tasks.
    """
    for part in (train, validation):
        check_distinct(part)
    rng = np.random.default_rng(seed)
    return RouterData(
        train=_labelled(train, params.per_task, params.reworded, rng),
        validation=_labelled(validation, params.validation_per_task, params.reworded, rng),
    )


def draw(size: int, count: int, rng: np.random.Generator) -> list[int]:
    """Draw `count` of `size` rows, each as often as any other, give or take once."""
    passes = [rng.permutation(size) for _ in range(-(-count // size))]
    return [int(row) for row in np.concatenate(passes)[:count]]


def balanced_examples(
    examples: Mapping[str, Sequence[Example]], count: int, *, seed: int
) -> list[Example]:
    """Draw `count` examples of every task; the tasks take turns."""
    rng = np.random.default_rng(seed)
    drawn = [
        [examples[task][row] for row in draw(len(examples[task]), count, rng)]
        for task in sorted(examples)
    ]
    return [example for turn in zip(*drawn, strict=True) for example in turn]


def _labelled(
    examples: Mapping[str, Sequence[Example]],
    count: int,
    reworded: float,
    rng: np.random.Generator,
) -> list[Labelled]:
    questions = {
        task: [example.question for example in asked(own, share=reworded)]
        for task, own in examples.items()
    }
    return [
        Labelled(questions[task][row], task)
        for task in sorted(questions)
        for row in draw(len(questions[task]), count, rng)
    ]


def write_router_data(folder: Path, data: RouterData) -> None:
    """Write train and validation as parquet files."""
    with written_folder(folder) as aside:
        for name, rows in (("train", data.train), ("validation", data.validation)):
            write_table(aside / f"{name}.parquet", [asdict(row) for row in rows], _LABELLED)


def read_labelled(file: Path) -> list[Labelled]:
    """Read the train or validation file of router data."""
    return record_of(list[Labelled], read_table(file))
