"""A folder as the pipeline leaves it, with examples and the model that the stage `model` writes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from dlplora.lifecycle.model import write_model
from dlplora.params.load import load_params
from dlplora.params.overrides import served_of
from dlplora.records.examples import (
    SPLITS,
    Example,
    Split,
    example_id,
    examples_path,
    write_examples,
)
from dlplora.records.files import write_json, write_table
from tests.answering import TASKS, write_answering_project

ROOT = Path(__file__).parent.parent.parent
NUMBERS = ("one", "two", "three", "four")
COLOURS = ("red", "green", "blue", "grey")
Questions = Mapping[tuple[str, Split], list[str]]  # by task and split


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change params.yaml by a function of its parsed values."""
    values = yaml.safe_load(file.read_text())
    change(values)
    file.write_text(yaml.safe_dump(values, sort_keys=False))


def questions(count: int = 6) -> dict[tuple[str, Split], list[str]]:
    """Make some questions of each task and split, no two of them the same."""
    return {
        (task, split): [
            f"which of {task} : {split} {NUMBERS[place % 4]} {'a ' * place}?"
            for place in range(count)
        ]
        for task in TASKS
        for split in SPLITS
    }


def write_data(folder: Path, asked: Questions, *, free: Mapping[str, str] | None = None) -> None:
    """Write the examples of questions, and the model made of them.

    They are of multiple choice, but for the tasks in `free`, whose answer is a text.
    """
    for (task, split), texts in asked.items():
        answer = (free or {}).get(task)
        options = COLOURS if answer is None else None
        rows = [
            Example(
                example_id(task, text),
                task,
                text,
                (answer or COLOURS[len(text) % 4],),
                options,
                None,
            )
            for text in texts
        ]
        write_examples(examples_path(folder / "data/examples", split, task), rows)
    calibration = folder / "data/router_data/validation.parquet"
    write_table(calibration, [{"text": "say red"}], pa.schema([("text", pa.string())]))
    make_model(folder)


def make_model(folder: Path) -> None:
    """Write the model of what is there, as the stage does."""
    data = folder / "data"
    write_model(
        data / "model",
        served_of(load_params(folder / "params.yaml")),
        base=data / "base",
        examples=data / "examples",
        adapters=data / "adapters",
        routers=data / "routers",
        calibration=data / "router_data/validation.parquet",
    )


def write_serving_project(folder: Path, asked: Questions | None = None) -> None:
    """Write params.yaml and data/ into a folder, with a model."""
    stages = folder / "dvc.yaml"
    before = stages.read_text() if stages.exists() else None
    write_answering_project(ROOT, folder)
    if before is not None:
        stages.write_text(before)

    def change(values: dict[str, Any]) -> None:
        del values["systems"]["unmade"], values["routers"]["unmade"]
        used = {"base", "single", "uniform", "logo", "joined", "fused", "dlp_mlp", "random"}
        used |= {"dlp_mlp_top1", "told_experts", "weighed_experts"}
        values["systems"] = {name: row for name, row in values["systems"].items() if name in used}
        values["gate"] |= {"minimum_items": 8, "max_latency_ratio": 1e9}
        values["runtime"] |= {"threads": 2}
        values["answers"]["max_mib"] = 1

    edit(folder / "params.yaml", change)
    write_json(folder / "data/code/evaluate.json", {})
    write_data(folder, asked or questions())
