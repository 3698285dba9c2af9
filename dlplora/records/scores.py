"""Scores: what an evaluation measured, item by item and summed up."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from dlplora.records.examples import Kind
from dlplora.records.files import (
    read_json,
    read_table,
    record_of,
    write_json,
    write_table,
    written_folder,
)
from dlplora.records.routes import PER_TOKEN, Route

_TEXTS = pa.list_(pa.string())
_NUMBERS = pa.list_(pa.float64())
_COUNTS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("prompt", pa.string()),
        ("prediction", pa.string()),
        ("references", _TEXTS),
        ("answer_after", pa.string()),
        ("score", pa.float64()),
        ("generated", pa.string()),
        ("options", _TEXTS),
        ("option_logprobs", _NUMBERS),
        ("option_tokens", _COUNTS),
        ("option_bytes", _COUNTS),
        ("adapters", _TEXTS),
        ("weights", _NUMBERS),
        ("confidence", pa.float64()),
    ]
)
# The columns of an item's options, and of its route, by field.
_OPTIONS = {
    "options": "options",
    "logprobs": "option_logprobs",
    "tokens": "option_tokens",
    "bytes": "option_bytes",
}
_ROUTE = ("adapters", "weights", "confidence")


@dataclass(frozen=True)
class OptionScores:
    """The options of a multiple-choice question under the model, one entry each.

    `logprobs` are sums over the option's tokens.
    """

    options: tuple[str, ...]
    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]

    @property
    def best(self) -> str:
        """The option of the highest mean log-likelihood of a token; of equals the first."""
        means = [
            logprob / tokens for logprob, tokens in zip(self.logprobs, self.tokens, strict=True)
        ]
        return self.options[means.index(max(means))]


@dataclass(frozen=True)
class ItemScore:
    """One test item as one system answered it.

    `prediction` is the chosen option or the generated text; `generated` is always the text.
    Exact match reads what follows `answer_after` in texts and references, if there is one.
    """

    id: str
    task: str
    prompt: str
    prediction: str
    references: tuple[str, ...]
    score: float
    generated: str
    options: OptionScores | None
    route: Route
    answer_after: str | None = None


@dataclass(frozen=True)
class TaskScore:
    """How one system did on one task: fractions of 1, with a 95 % interval of the primary."""

    n: int
    kind: Kind
    primary: str
    score: float
    score_low: float
    score_high: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Summary:
    """How one system did in one setting; `score` is the mean over its tasks."""

    setting: str
    system: str
    seed: int
    score: float
    score_low: float
    score_high: float
    routing_accuracy: float | None
    adapters_per_prompt: float | None
    tasks: Mapping[str, TaskScore]


def summary_to_json(summary: Summary) -> dict[str, Any]:
    """Lay a summary out as its file holds it, the metrics of a task beside its score."""
    values = asdict(summary)
    for row in values["tasks"].values():
        row.update(row.pop("metrics"))
    return values


def summary_from_json(values: Mapping[str, Any]) -> Summary:
    """Read a summary back."""
    named = {field.name for field in fields(TaskScore)}
    tasks = {
        name: {key: row[key] for key in row if key in named}
        | {"metrics": {key: row[key] for key in row if key not in named}}
        for name, row in values["tasks"].items()
    }
    return record_of(Summary, {**values, "tasks": tasks})


def item_id(number: int, place: int, example_id: str) -> str:
    """Name a question of a multi-question prompt; the first place is 0."""
    return f"{number}:{place}:{example_id}"


def place_of(name: str) -> int:
    """Return the place of a question that `item_id` has named."""
    return int(name.split(":")[1])


def write_scores(folder: Path, items: Sequence[ItemScore], summary: Summary) -> None:
    """Write items.parquet and summary.json of one system."""
    with written_folder(folder) as aside:
        write_table(aside / "items.parquet", [_item_to_row(item) for item in items], _SCHEMA)
        write_json(aside / "summary.json", summary_to_json(summary))


def read_summary(folder: Path) -> Summary:
    """Read summary.json of one system."""
    return summary_from_json(read_json(folder / "summary.json"))


def read_items(folder: Path) -> list[ItemScore]:
    """Read items.parquet of one system."""
    rows = read_table(folder / "items.parquet")
    return record_of(list[ItemScore], [_row_to_item(row) for row in rows])


def _item_to_row(item: ItemScore) -> dict[str, Any]:
    row = asdict(item)
    options, route = row.pop("options"), row.pop("route")
    row |= {column: options and options[name] for name, column in _OPTIONS.items()}
    # In a table, adapters per token are null.
    return row | {name: None if item.route.per_token else route[name] for name in _ROUTE}


def _row_to_item(row: dict[str, Any]) -> dict[str, Any]:
    options = {name: row.pop(column) for name, column in _OPTIONS.items()}
    route = {name: row.pop(name) for name in _ROUTE}
    return row | {
        "options": None if options["options"] is None else options,
        "route": PER_TOKEN if route["adapters"] is None else route,
    }
