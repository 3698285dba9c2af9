"""Scores: what an evaluation measured, item by item and summed up."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from dlplora.records.examples import Kind
from dlplora.records.files import read_json, read_table, write_json, write_table, written_folder
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
    values = {
        field.name: getattr(summary, field.name)
        for field in fields(summary)
        if field.name != "tasks"
    }
    tasks = {}
    for name, task in summary.tasks.items():
        row = asdict(task)
        tasks[name] = {key: row[key] for key in row if key != "metrics"} | row["metrics"]
    return values | {"tasks": tasks}


def summary_from_json(values: Mapping[str, Any]) -> Summary:
    """Read a summary back."""
    named = {field.name for field in fields(TaskScore)}
    tasks = {
        name: TaskScore(
            **{key: row[key] for key in row if key in named},
            metrics={key: row[key] for key in row if key not in named},
        )
        for name, row in values["tasks"].items()
    }
    return Summary(**{key: values[key] for key in values if key != "tasks"}, tasks=tasks)


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
    return [_row_to_item(row) for row in read_table(folder / "items.parquet")]


def _item_to_row(item: ItemScore) -> dict[str, Any]:
    options, route = item.options, item.route
    named = None if route.per_token else route  # in a table, adapters per token are null
    return {
        "id": item.id,
        "task": item.task,
        "prompt": item.prompt,
        "prediction": item.prediction,
        "references": item.references,
        "answer_after": item.answer_after,
        "score": item.score,
        "generated": item.generated,
        "options": options and options.options,
        "option_logprobs": options and options.logprobs,
        "option_tokens": options and options.tokens,
        "option_bytes": options and options.bytes,
        "adapters": named and named.adapters,
        "weights": named and named.weights,
        "confidence": named and named.confidence,
    }


def _row_to_item(row: Mapping[str, Any]) -> ItemScore:
    options, route = None, PER_TOKEN
    if row["adapters"] is not None:
        route = Route(tuple(row["adapters"]), tuple(row["weights"]), row["confidence"])
    if row["options"] is not None:
        options = OptionScores(
            tuple(row["options"]),
            tuple(row["option_logprobs"]),
            tuple(row["option_tokens"]),
            tuple(row["option_bytes"]),
        )
    return ItemScore(
        id=row["id"],
        task=row["task"],
        prompt=row["prompt"],
        prediction=row["prediction"],
        references=tuple(row["references"]),
        score=row["score"],
        generated=row["generated"],
        options=options,
        route=route,
        answer_after=row["answer_after"],
    )
