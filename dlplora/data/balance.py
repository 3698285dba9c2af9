"""Balanced router data: the same number of questions from every task, and composites of several."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from dlplora.data.wordings import asked, check_distinct
from dlplora.params.routing import Balance
from dlplora.records.examples import Example
from dlplora.records.files import read_table, record_of, write_table, written_folder

_TEXTS = pa.list_(pa.string())
_LABELLED = pa.schema([("text", pa.string()), ("task", pa.string())])
_COMPOSITES = pa.schema(
    [("text", pa.string()), ("questions", _TEXTS), ("answers", _TEXTS), ("tasks", _TEXTS)]
)


@dataclass(frozen=True)
class Labelled:
    """A text with the task that it belongs to."""

    text: str
    task: str


@dataclass(frozen=True)
class Composite:
    """Several questions in one numbered text, with their answers and the sequence of tasks."""

    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class RouterData:
    """What routers learn from and are stopped by, and composites of several tasks."""

    train: list[Labelled]
    validation: list[Labelled]
    composites: list[Composite]


def balance(
    train: Mapping[str, Sequence[Example]],
    validation: Mapping[str, Sequence[Example]],
    *,
    params: Balance,
    seed: int,
) -> RouterData:
    """Draw router data from the examples of each task.

    Every task contributes exactly `per_task` texts to training and `validation_per_task` to
    validation. Composites join 2, 3, … questions of different tasks, in the order of
    `params.parts`, as long as there are so many tasks. Raises `DataError` if wordings make the same
    question of two tasks.
    """
    for part in (train, validation):
        check_distinct(part)
    rng = np.random.default_rng(seed)
    return RouterData(
        train=_labelled(train, params.per_task, params.reworded, rng),
        validation=_labelled(validation, params.validation_per_task, params.reworded, rng),
        composites=_composites(train, params, seed),
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


def _composites(
    examples: Mapping[str, Sequence[Example]], params: Balance, seed: int
) -> list[Composite]:
    sizes = [size for size in params.parts if size <= len(examples)]
    count = -(-params.composites // max(len(sizes), 1))  # of each size
    drawn = [draw_questions(examples, size, count=count, seed=seed) for size in sizes]
    return [
        Composite(
            text=composite_text([part.question for part in parts]),
            questions=tuple(part.question for part in parts),
            answers=tuple(part.answers[0] for part in parts),
            tasks=tuple(part.task for part in parts),
        )
        for parts in islice(chain.from_iterable(zip(*drawn, strict=True)), params.composites)
    ]


def draw_questions(
    examples: Mapping[str, Sequence[Example]], size: int, *, count: int, seed: int
) -> list[list[Example]]:
    """Draw the questions of `count` composites, each of so many different tasks.

    Tasks take turns to be in one; the others, the questions and their order are drawn by hashes. So
    another task changes none of the composites that it is not part of.
    """

    def rank(*names: object) -> bytes:
        return hashlib.sha256("\0".join(map(str, (seed, size, *names))).encode()).digest()

    turns = sorted(examples, key=rank)
    drawn = []
    for number in range(count):
        turn, place = divmod(number, len(turns))
        own = turns[place]
        others = sorted(examples.keys() - {own}, key=partial(rank, own, turn))
        tasks = sorted([own, *others[: size - 1]], key=partial(rank, own, turn, "order"))
        drawn.append(
            [min(examples[task], key=lambda row: rank(own, turn, row.id)) for task in tasks]
        )
    return drawn


def states_of(composite: Composite) -> list[Labelled]:
    """Return what a router meets while a composite is answered, and the task that is next.

    That is the prompt; with the answers so far; and with the next answer's first word as well.
    """
    states = [Labelled(composite.text, composite.tasks[0])]
    for place, (answer, task) in enumerate(zip(composite.answers, composite.tasks, strict=True)):
        so_far = "\n".join([composite.text, *composite.answers[:place]])
        if place:
            states.append(Labelled(so_far, task))
        states.append(Labelled(f"{so_far}\n{answer.split()[0]}", task))
    return states


def composite_text(questions: Sequence[str]) -> str:
    """Number several questions as one prompt."""
    return "\n".join(f"{number}. {text.strip()}" for number, text in enumerate(questions, start=1))


def write_router_data(folder: Path, data: RouterData) -> None:
    """Write train, validation and composites as parquet files."""
    with written_folder(folder) as aside:
        write_table(aside / "train.parquet", [asdict(row) for row in data.train], _LABELLED)
        write_table(
            aside / "validation.parquet", [asdict(row) for row in data.validation], _LABELLED
        )
        rows = [asdict(row) for row in data.composites]
        write_table(aside / "composites.parquet", rows, _COMPOSITES)


def read_training_texts(folder: Path) -> list[Labelled]:
    """Read what routers learn from: the training texts, and the states of the composites."""
    composites = read_composites(folder / "composites.parquet")
    states = [state for composite in composites for state in states_of(composite)]
    return [*read_labelled(folder / "train.parquet"), *states]


def read_labelled(file: Path) -> list[Labelled]:
    """Read the train or validation file of router data."""
    return record_of(list[Labelled], read_table(file))


def read_composites(file: Path) -> list[Composite]:
    """Read the composites of router data."""
    return record_of(list[Composite], read_table(file))
