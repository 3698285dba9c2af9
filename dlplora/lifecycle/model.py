"""The folder of a model: all that serves but the base model, and what it was made from."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from dlplora.params.project import BASE, PARAMS_FILE, Served
from dlplora.params.yaml import dump_yaml
from dlplora.records.base_card import read_base_card
from dlplora.records.examples import SPLITS, Example, examples_path, normalise, read_examples
from dlplora.records.files import written_folder
from dlplora.records.model_card import (
    CALIBRATION_FILE,
    ModelCard,
    SplitItem,
    TaskData,
    write_items,
    write_model_card,
)


def write_model(
    out: Path,
    params: Served,
    *,
    base: Path,
    examples: Path,
    adapters: Path,
    routers: Path,
    calibration: Path,
) -> None:
    """Write a model: the adapters of all tasks, and the routers of the systems in its params.

    `calibration` is a table of questions that no training read: what is measured on them tells
    what is usual for the model.
    """
    items: list[SplitItem] = []
    tasks: dict[str, TaskData] = {}
    for task in sorted(params.tasks):
        parts = {split: read_examples(examples_path(examples, split, task)) for split in SPLITS}
        rows = [example for part in parts.values() for example in part]
        sizes = {split: len(part) for split, part in parts.items()}
        tasks[task] = TaskData(**sizes, sha256=_sha256(*rows), labels=_labels(rows))
        items += [
            SplitItem(task, split, question_sha256(example), answers_sha256(example))
            for split, part in parts.items()
            for example in part
        ]
    with written_folder(out) as aside:
        for task in tasks:
            shutil.copytree(adapters / task, aside / "adapters" / task)
        for path in sorted({system.router for system in params.systems.values()} - {BASE}):
            name = Path(path).name
            shutil.copytree(routers / name, aside / "routers" / name)
        shutil.copyfile(calibration, aside / CALIBRATION_FILE)
        write_items(aside, items)
        served = dump_yaml(params.model_dump(mode="json"))
        (aside / PARAMS_FILE).write_text(served, encoding="utf-8")
        write_model_card(
            aside, ModelCard(read_base_card(base).fingerprint, params.default_system, tasks)
        )


def _labels(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the options of examples, sorted; nothing if they have none or different ones."""
    found = {tuple(sorted(example.options or ())) for example in examples}
    return found.pop() if len(found) == 1 else ()


def question_sha256(example: Example) -> str:
    """Hash the normalised question of an example, whatever its task."""
    return hashlib.sha256(normalise(example.question).encode()).hexdigest()


def answers_sha256(example: Example) -> str:
    """Hash what counts as a right answer to an example."""
    return hashlib.sha256(repr((example.answers, example.options)).encode()).hexdigest()


def _sha256(*examples: Example) -> str:
    return hashlib.sha256(repr(examples).encode()).hexdigest()
