"""All systems of a setting side by side, on the same items."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dlplora.errors import DataError
from dlplora.evaluation.captions import caption, is_joint
from dlplora.evaluation.metrics import (
    Numbers,
    interval,
    mean_over_tasks,
    resampled_tasks,
    score_task,
    summarise,
)
from dlplora.params.systems import SystemEntry
from dlplora.records.comparison import Comparison, Difference, Position, Routing, Sample
from dlplora.records.scores import ItemScore, place_of, read_items
from dlplora.routing.base import calibration_error
from dlplora.words import NUM_QUESTIONS, Primary, Setting

_SAMPLES_PER_TASK = 3


def compare(
    scores: Path,
    *,
    setting: Setting,
    primaries: Mapping[str, Primary],
    systems: Mapping[str, SystemEntry],
    reference: str,
    default: str,
    seed: int,
) -> Comparison:
    """Compare systems with each other, and with the reference, over the tasks of `primaries`.

    `systems` are what the params say of those that answered in the setting; the report shows the
    `default` beside base and reference.

    Raises `DataError` if two systems did not answer the same items.
    """
    items = {
        name: [row for row in read_items(scores / setting / name) if row.task in primaries]
        for name in systems
    }
    asked = [item.id for item in items[reference]]
    for name, rows in items.items():
        if [item.id for item in rows] != asked:
            raise DataError(f"{scores / setting / name}: other items than those of {reference}")
    met = {item.task for item in items[reference]}
    primaries = {task: primary for task, primary in primaries.items() if task in met}
    resampled = {name: resampled_tasks(rows, primaries, seed=seed) for name, rows in items.items()}
    summaries = {
        name: summarise(rows, primaries, resampled[name], setting=setting, system=name, seed=seed)
        for name, rows in items.items()
    }
    means = {name: mean_over_tasks(tasks) for name, tasks in resampled.items()}
    best = summaries[reference]
    differences = {
        name: _difference(summary.score - best.score, means[name] - means[reference])
        for name, summary in summaries.items()
    }
    task_differences = {
        name: {
            task: _difference(
                row.score - best.tasks[task].score,
                resampled[name][task] - resampled[reference][task],
            )
            for task, row in summary.tasks.items()
        }
        for name, summary in summaries.items()
    }
    return Comparison(
        setting=setting,
        reference=reference,
        default=default,
        captions={name: caption(system) for name, system in systems.items()},
        joint=tuple(name for name, system in systems.items() if is_joint(system)),
        summaries=summaries,
        differences=differences,
        task_differences=task_differences,
        positions={
            name: _by_position(rows, primaries, seed=seed)
            for name, rows in items.items()
            if NUM_QUESTIONS[setting] > 1
        },
        routing={
            name: _routing(rows)
            for name, rows in items.items()
            if not any(item.route.per_token for item in rows)
        },
        samples=_samples(items, sorted(primaries), reference),
    )


def _difference(gap: float, resampled: Numbers) -> Difference:
    low, high = interval(resampled)
    return Difference(gap, low, high)


def _by_position(
    items: Sequence[ItemScore], primaries: Mapping[str, Primary], *, seed: int
) -> tuple[Position, ...]:
    """Score the first questions of all prompts, the second ones, …: means over tasks."""
    places: dict[int, list[ItemScore]] = {}
    for item in items:
        places.setdefault(place_of(item.id), []).append(item)
    found = []
    for _, own in sorted(places.items()):
        met = {item.task for item in own}
        shown = {task: primary for task, primary in primaries.items() if task in met}
        resampled = resampled_tasks(own, shown, seed=seed)
        scores = [
            score_task([item for item in own if item.task == task], primary, resampled[task]).score
            for task, primary in shown.items()
        ]
        found.append(Position(float(np.mean(scores)), *interval(mean_over_tasks(resampled))))
    return tuple(found)


def _routing(items: Sequence[ItemScore]) -> Routing:
    routes = [item.route for item in items]
    confusion: dict[str, Counter[str]] = {}
    for item, route in zip(items, routes, strict=True):
        confusion.setdefault(item.task, Counter())[route.first or "none"] += 1
    sizes = Counter(len(route.adapters) for route in routes)
    confidences = [route.confidence for route in routes]
    error = None
    has_firsts = any(route.first for route in routes)
    if has_firsts and all(confidence is not None for confidence in confidences):
        right = np.array(
            [route.first == item.task for item, route in zip(items, routes, strict=True)]
        )
        error = calibration_error(np.array(confidences, dtype=np.float64), right)
    return Routing(
        confusion={task: dict(sorted(row.items())) for task, row in sorted(confusion.items())},
        num_adapters={str(size): count for size, count in sorted(sizes.items())},
        calibration_error=error,
    )


def _samples(
    items: Mapping[str, Sequence[ItemScore]], tasks: Sequence[str], reference: str
) -> tuple[Sample, ...]:
    samples = []
    for task in tasks:
        places = [place for place, item in enumerate(items[reference]) if item.task == task]
        for place in places[:_SAMPLES_PER_TASK]:
            first = items[reference][place]
            answers = {
                name: {
                    "text": rows[place].prediction,
                    "score": rows[place].score,
                    "route": None if rows[place].route.per_token else dict(rows[place].route.mix),
                }
                for name, rows in items.items()
            }
            samples.append(Sample(task, first.prompt, first.references, answers))
    return tuple(samples)
