"""The comparison of systems in one setting, as the report shows it."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from dlplora.records.files import read_json, record_of, write_json, written_folder
from dlplora.records.novelty import Novelties, Novelty, read_novelty, write_novelty
from dlplora.records.scores import Summary, summary_from_json, summary_to_json
from dlplora.records.training import AdapterTraining
from dlplora.words import Setting

_NOVELTY = "novelty"


@dataclass(frozen=True)
class Difference:
    """A system's score minus the reference's, on the same items, with a paired interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Position:
    """What a system scored on the questions that stand at one place in their prompts."""

    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Routing:
    """How one system routed: first choices by true task, and numbers of adapters of prompts.

    `confusion[task][adapter]` counts items; `num_adapters[n]` counts prompts with n adapters;
    `calibration_error` is the expected one on test items, where the router gives confidences.
    """

    confusion: Mapping[str, Mapping[str, int]]
    num_adapters: Mapping[str, int]
    calibration_error: float | None


@dataclass(frozen=True)
class Sample:
    """One test item with what each system answered: text, score, adapters and weights."""

    task: str
    prompt: str
    references: tuple[str, ...]
    answers: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """All systems of one setting, in the order in which they are shown.

    The reference is told each question's task. The default is what users ask; `captions` say how
    each system answers, and `joint` are those trained on several tasks together.
    `task_differences[system][task]` are those of one task alone, and `positions[system]` those of
    the first, second, … questions where a prompt has several.
    """

    setting: str
    reference: str
    default: str
    captions: Mapping[str, str]
    joint: tuple[str, ...]
    summaries: Mapping[str, Summary]
    differences: Mapping[str, Difference]
    task_differences: Mapping[str, Mapping[str, Difference]]
    positions: Mapping[str, tuple[Position, ...]]
    routing: Mapping[str, Routing]
    samples: tuple[Sample, ...]

    def normalised(self, system: str) -> float | None:
        """Return a system's score by the reference's; None if that is 0."""
        best = self.summaries[self.reference].score
        return self.summaries[system].score / best if best else None


def write_comparisons(
    folder: Path,
    comparisons: Sequence[Comparison],
    novelties: Novelties,
    trainings: Mapping[str, AdapterTraining],
) -> None:
    """Write the folder that the report reads, and in plots/ the tables that DVC plots."""
    with written_folder(folder) as aside:
        for task, novelty in novelties.items():
            write_novelty(aside / _NOVELTY / f"{task}.json", novelty)
        for comparison in comparisons:
            write_json(aside / f"{comparison.setting}.json", _to_json(comparison))
        plots = aside / "plots"
        plots.mkdir()
        scores = [
            (f"{name} ({comparison.setting})", summary.score)
            for comparison in comparisons
            for name, summary in comparison.summaries.items()
        ]
        losses = [
            (task, point.step, point.loss, point.validation_loss)
            for task, training in trainings.items()
            for point in training.curve.points
            if None not in (point.loss, point.validation_loss)  # DVC takes an empty cell for 0
        ]
        _write_csv(plots / "scores.csv", ("system", "score"), scores)
        _write_csv(plots / "confusion.csv", ("task", "adapter"), _first_choices(comparisons[0]))
        _write_csv(plots / "learning.csv", ("task", "step", "loss", "validation_loss"), losses)


def write_metrics(comparison: Path, metrics: Path, comparisons: Sequence[Comparison]) -> None:
    """Write what is known of each system by setting, and the scores alone, which git keeps."""
    write_json(comparison, {found.setting: _metrics(found) for found in comparisons})
    scores = {
        found.setting: {name: summary.score for name, summary in found.summaries.items()}
        for found in comparisons
    }
    write_json(metrics, scores)


def _write_csv(file: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as written:
        csv.writer(written, lineterminator="\n").writerows([head, *rows])


def _first_choices(comparison: Comparison) -> Iterator[tuple[object, ...]]:
    """Yield for each item its task and the default system's first adapter."""
    routing = comparison.routing.get(comparison.default)
    for task, row in routing.confusion.items() if routing else ():
        for adapter, count in row.items():
            yield from [(task, adapter)] * count


def _to_json(comparison: Comparison) -> dict[str, Any]:
    summaries = {name: summary_to_json(row) for name, row in comparison.summaries.items()}
    return asdict(comparison) | {"summaries": summaries}


def _metrics(comparison: Comparison) -> dict[str, Any]:
    return {
        name: {
            "score": summary.score,
            "low": summary.score_low,
            "high": summary.score_high,
            "normalised": comparison.normalised(name),
            "routing_accuracy": summary.routing_accuracy,
        }
        for name, summary in comparison.summaries.items()
    }


def read_novelties(folder: Path, tasks: Sequence[str]) -> dict[str, dict[str, Novelty]]:
    """Read what routers did on unseen tasks."""
    return {task: read_novelty(folder / _NOVELTY / f"{task}.json") for task in tasks}


def read_comparisons(folder: Path) -> list[Comparison]:
    """Read back the comparisons of all settings in which systems answered."""
    files = [folder / f"{setting}.json" for setting in get_args(Setting)]
    return [_read(file) for file in files if file.exists()]


def _read(file: Path) -> Comparison:
    values = read_json(file)
    summaries = {name: summary_from_json(row) for name, row in values["summaries"].items()}
    return record_of(Comparison, values | {"summaries": summaries})
