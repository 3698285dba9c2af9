"""Systems side by side, from small folders of scores."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlplora.errors import DataError
from dlplora.evaluation.captions import caption
from dlplora.evaluation.compare import compare
from dlplora.evaluation.metrics import METRICS, resampled_scores, resampled_tasks, summarise
from dlplora.params.systems import BaseSystem, ByTask, Fixed, SystemEntry, TopKSystem
from dlplora.records.comparison import (
    Comparison,
    Difference,
    read_comparisons,
    read_novelties,
    write_comparisons,
    write_metrics,
)
from dlplora.records.novelty import Novelty
from dlplora.records.routes import BASE_ROUTE, PER_TOKEN, Route
from dlplora.records.scores import ItemScore, OptionScores, read_summary, write_scores
from dlplora.records.training import Curve, CurvePoint
from dlplora.words import Primary
from tests.answering import system_entry
from tests.peft_adapters import training_of

NOVELTY = {"mlp": Novelty(60, 40, 0.9, 0.8, 0.95, 0.7)}
PRIMARIES: dict[str, Primary] = {"colours": "accuracy", "opposites": "rougeL"}
N = {"colours": 8, "opposites": 6}
SEED = 11
Router = Callable[[int, str], Route]

RIGHT = {
    "base": {"colours": [0, 5], "opposites": [1]},
    "single": {"colours": [0, 1, 2, 3, 4, 5], "opposites": [0, 1, 2, 3, 4]},
    "random": {"colours": [0, 1, 2], "opposites": [0, 5]},
    "routed": {"colours": [0, 1, 2, 3, 4, 5], "opposites": [0, 1, 2, 3]},
}


def to_own(_: int, task: str) -> Route:
    return Route((task,), (1.0,))


def by_parity(place: int, _: str) -> Route:
    return Route(("colours" if place % 2 else "opposites",), (1.0,))


def mostly_own(place: int, task: str) -> Route:
    """Route item 0 to a tie, item 1 to the other task, and the rest to their own."""
    other = "opposites" if task == "colours" else "colours"
    if place == 0:
        return Route((task, other), (0.5, 0.5), 0.5)
    if place == 1:
        return Route((other,), (1.0,), 0.9)
    return Route((task,), (1.0,), 0.9)


ROUTES: dict[str, Router] = {
    "base": lambda _place, _task: BASE_ROUTE,
    "single": to_own,
    "random": by_parity,
    "routed": mostly_own,
}


def items_of(system: str, task: str) -> list[ItemScore]:
    """Make the items of a task as a system answered them."""
    rows = []
    for place in range(N[task]):
        is_right = place in RIGHT[system][task]
        if task == "colours":
            options = OptionScores(("red", "blue"), (-1.0, -2.0), (1, 1), (3, 4))
            text, references = ("red" if is_right else "blue"), ("red",)
        else:
            options = None
            text = "it goes down" if is_right else "it goes up there"
            references = ("it goes down", "down")
        rows.append(
            ItemScore(
                id=f"{task}-{place}",
                task=task,
                prompt=f"question {place} of {task}",
                prediction=text,
                references=references,
                score=METRICS[PRIMARIES[task]].of_item(text, references, None),
                generated=text,
                options=options,
                route=ROUTES[system](place, task),
            )
        )
    return rows


def write_system(folder: Path, system: str, items: Sequence[ItemScore]) -> None:
    tasks = dict.fromkeys(item.task for item in items)
    primaries = {task: PRIMARIES[task] for task in tasks}
    resampled = resampled_tasks(items, primaries, seed=SEED)
    summary = summarise(items, primaries, resampled, setting="iid", system=system, seed=SEED)
    write_scores(folder, items, summary)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Folders of the scores of four systems."""
    folder = tmp_path / "scores"
    for system in RIGHT:
        items = [item for task in PRIMARIES for item in items_of(system, task)]
        write_system(folder / "iid" / system, system, items)
    return folder


def in_prompts(items: Sequence[ItemScore]) -> list[ItemScore]:
    """Return items as those of prompts of two questions."""
    return [
        replace(item, id=f"{number // 2}:{number % 2}:{item.id}")
        for number, item in enumerate(items)
    ]


def entries(names: Sequence[str]) -> dict[str, SystemEntry]:
    """Return what the params say of systems: all but two are routed."""
    mlp = {"router": "data/routers/mlp", "k": 2, "weights": "equal"}
    known: dict[str, SystemEntry] = {
        "base": BaseSystem(**system_entry("base")),
        "single": ByTask(**system_entry("by_task", adapters="data/adapters")),
    }
    return {name: known.get(name) or TopKSystem(**system_entry("top_k", **mlp)) for name in names}


def compared(scores: Path, names: Sequence[str] = ("random", "routed"), **more: Any) -> Comparison:
    values: dict[str, Any] = {"setting": "iid", "primaries": PRIMARIES, "reference": "single"}
    values |= {"systems": entries(["base", "single", *names]), "default": "routed", "seed": SEED}
    return compare(scores, **values | more)


def test_systems_stand_in_the_order_given_with_their_captions(scores: Path) -> None:
    comparison = compared(scores, ["routed", "random"])

    names = ["base", "single", "routed", "random"]
    for of_system in (
        comparison.summaries,
        comparison.differences,
        comparison.routing,
        comparison.captions,
    ):
        assert list(of_system) == names
    assert comparison.captions == {name: caption(row) for name, row in entries(names).items()}
    assert (comparison.setting, comparison.reference) == ("iid", "single")
    assert (comparison.default, comparison.joint) == ("routed", ())


def test_systems_that_were_trained_on_several_tasks_together_are_known(scores: Path) -> None:
    joint = {name: "data/joint/one" if name == "random" else "data/merged/two" for name in RIGHT}
    systems = {name: Fixed(**system_entry("fixed", artifact=path)) for name, path in joint.items()}

    assert compared(scores, systems=systems).joint == ("random",)


def test_a_summary_of_the_comparison_is_the_one_that_the_evaluation_wrote(scores: Path) -> None:
    comparison = compared(scores)

    for system in RIGHT:
        assert comparison.summaries[system] == read_summary(scores / "iid" / system)


def test_questions_are_scored_by_their_place_in_the_prompt(scores: Path) -> None:
    for system in RIGHT:
        items = [item for task in PRIMARIES for item in items_of(system, task)]
        write_system(scores / "composite_2" / system, system, in_prompts(items))
    positions = compared(scores, setting="composite_2").positions

    assert compared(scores).positions == {}
    for system in RIGHT:
        by_task = [[item.score for item in items_of(system, task)] for task in PRIMARIES]
        for place, found in enumerate(positions[system]):
            own = [np.mean(row[place::2]) for row in by_task]
            assert found.score == pytest.approx(np.mean(own))
            assert found.low <= found.score <= found.high


def test_single_does_not_differ_from_itself(scores: Path) -> None:
    assert compared(scores).differences["single"] == Difference(0.0, 0.0, 0.0)


def test_a_difference_is_that_of_the_means_over_tasks(scores: Path) -> None:
    comparison = compared(scores)

    def mean(system: str) -> float:
        by_task = [np.mean([item.score for item in items_of(system, task)]) for task in PRIMARIES]
        return float(np.mean(by_task))

    for system, row in comparison.differences.items():
        assert row.difference == pytest.approx(mean(system) - mean("single"))
    assert comparison.differences["base"].difference < -0.2


@pytest.mark.parametrize("system", ["base", "random", "routed"])
def test_the_interval_of_a_difference_is_paired(scores: Path, system: str) -> None:
    row = compared(scores).differences[system]

    resampled = []
    for task in PRIMARIES:
        pairs = zip(items_of(system, task), items_of("single", task), strict=True)
        gaps = [replace(mine, score=mine.score - best.score) for mine, best in pairs]
        resampled.append(resampled_scores(gaps, "rougeL", seed=SEED))
    low, high = np.quantile(np.mean(resampled, axis=0), [0.025, 0.975])
    assert (row.low, row.high) == pytest.approx((low, high), abs=1e-12)
    assert row.low <= row.difference <= row.high


def test_the_differences_of_tasks_are_paired_and_their_mean_is_the_whole(scores: Path) -> None:
    comparison = compared(scores)

    for system, by_task in comparison.task_differences.items():
        mean = np.mean([row.difference for row in by_task.values()])
        assert comparison.differences[system].difference == pytest.approx(mean)
    assert comparison.task_differences["routed"]["colours"] == Difference(0.0, 0.0, 0.0)
    row = comparison.task_differences["random"]["opposites"]
    pairs = zip(items_of("random", "opposites"), items_of("single", "opposites"), strict=True)
    gaps = [replace(mine, score=mine.score - best.score) for mine, best in pairs]
    low, high = np.quantile(resampled_scores(gaps, "rougeL", seed=SEED), [0.025, 0.975])
    assert (row.low, row.high) == pytest.approx((low, high), abs=1e-12)
    assert row.low <= row.difference <= row.high


def test_a_system_that_answers_as_single_does_has_a_difference_without_width(
    scores: Path,
) -> None:
    items = [item for task in PRIMARIES for item in items_of("single", task)]
    write_system(scores / "iid" / "twin", "twin", items)

    comparison = compared(scores, ["twin"])

    assert comparison.differences["twin"] == Difference(0.0, 0.0, 0.0)
    assert comparison.summaries["twin"].score_low < comparison.summaries["twin"].score_high


def test_confusion_counts_first_choices_by_true_task(scores: Path) -> None:
    routing = compared(scores).routing

    assert routing["random"].confusion == {
        "colours": {"colours": 4, "opposites": 4},
        "opposites": {"colours": 3, "opposites": 3},
    }
    assert routing["routed"].confusion == {
        "colours": {"colours": 6, "none": 1, "opposites": 1},
        "opposites": {"colours": 1, "none": 1, "opposites": 4},
    }


def test_numbers_of_adapters_count_prompts(scores: Path) -> None:
    routing = compared(scores).routing

    assert routing["random"].num_adapters == {"1": 14}
    assert routing["routed"].num_adapters == {"1": 12, "2": 2}


def test_calibration_needs_confidences(scores: Path) -> None:
    routing = compared(scores).routing

    assert routing["random"].calibration_error is None
    # 2 ties at confidence 0.5, never right; 12 at 0.9, of which 10 are right
    by_hand = 2 / 14 * 0.5 + 12 / 14 * abs(10 / 12 - 0.9)
    assert routing["routed"].calibration_error == pytest.approx(by_hand)


def test_samples_are_the_first_items_of_each_task_with_the_answers_of_all(scores: Path) -> None:
    samples = compared(scores).samples

    asked = [(sample.task, sample.prompt) for sample in samples]
    assert asked == [
        (task, f"question {place} of {task}") for task in sorted(PRIMARIES) for place in range(3)
    ]
    assert all(list(s.answers) == ["base", "single", "random", "routed"] for s in samples)
    first = samples[0]
    assert first.references == ("red",)
    assert first.answers["base"] == {"text": "red", "score": 1.0, "route": {}}
    assert first.answers["routed"] == {
        "text": "red",
        "score": 1.0,
        "route": {"colours": 0.5, "opposites": 0.5},
    }
    assert samples[1].answers["base"] == {"text": "blue", "score": 0.0, "route": {}}
    assert samples[4].answers["random"]["text"] == "it goes up there"


def test_items_of_unlisted_tasks_are_left_out(scores: Path) -> None:
    comparison = compared(scores, ["routed"], primaries={"colours": "accuracy"})

    assert {sample.task for sample in comparison.samples} == {"colours"}
    assert list(comparison.routing["routed"].confusion) == ["colours"]
    assert comparison.summaries["routed"].score == pytest.approx(6 / 8)
    assert comparison.summaries["routed"].adapters_per_prompt == pytest.approx(9 / 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda items: items[:-1],
        lambda items: [replace(items[0], id="another"), *items[1:]],
        lambda items: [items[1], items[0], *items[2:]],
        lambda items: [*items, replace(items[-1], id="one more")],
    ],
    ids=["one less", "another one", "another order", "one more"],
)
def test_a_system_of_other_items_is_refused(
    scores: Path, change: Callable[[list[ItemScore]], list[ItemScore]]
) -> None:
    items = [item for task in PRIMARIES for item in items_of("random", task)]
    write_system(scores / "iid" / "random", "random", change(items))

    with pytest.raises(DataError, match=r"iid/random: other items than those of single"):
        compared(scores)


def test_a_system_that_weighs_each_token_has_no_routing(scores: Path) -> None:
    items = [
        replace(item, route=PER_TOKEN) for task in PRIMARIES for item in items_of("random", task)
    ]
    write_system(scores / "iid/arrow", "arrow", items)

    comparison = compared(scores, ["routed", "arrow"])

    assert list(comparison.routing) == ["base", "single", "routed"]
    assert comparison.summaries["arrow"].routing_accuracy is None
    assert comparison.summaries["arrow"].adapters_per_prompt is None
    assert comparison.samples[0].answers["arrow"]["route"] is None
    assert comparison.samples[0].answers["base"]["route"] == {}


def test_the_short_files_hold_scores_by_setting_and_system(scores: Path, tmp_path: Path) -> None:
    comparison = compared(scores)
    write_metrics(tmp_path / "comparison.json", tmp_path / "metrics.json", [comparison])

    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == {"iid": {name: row.score for name, row in comparison.summaries.items()}}
    values = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert list(values) == ["iid"]
    assert list(values["iid"]) == ["base", "single", "random", "routed"]
    best = comparison.summaries["single"].score
    for system, row in values["iid"].items():
        summary = comparison.summaries[system]
        assert row == {
            "score": summary.score,
            "low": summary.score_low,
            "high": summary.score_high,
            "normalised": summary.score / best,
            "routing_accuracy": summary.routing_accuracy,
        }
    accuracies = {name: row["routing_accuracy"] for name, row in values["iid"].items()}
    assert accuracies == pytest.approx(
        {"base": None, "single": 1, "random": 7 / 14, "routed": 10 / 14}
    )


def test_nothing_is_normalised_by_a_reference_that_scores_0(scores: Path) -> None:
    items = [
        replace(item, prediction="blue", generated="blue", score=0.0)
        for item in items_of("single", "colours")
    ]
    write_system(scores / "iid/single", "single", items + items_of("single", "opposites"))

    comparison = compared(scores, ["routed"], primaries={"colours": "accuracy"})

    assert [comparison.normalised(name) for name in comparison.summaries] == [None] * 3


def test_what_dvc_plots_are_scores_first_adapters_and_losses(scores: Path, tmp_path: Path) -> None:
    points = (CurvePoint(0, None, 3.5), CurvePoint(1, 2.25, None), CurvePoint(2, 2.0, 3.0))
    trainings = {"colours": replace(training_of("colours"), curve=Curve(points, 0))}
    comparison = compared(scores)

    write_comparisons(tmp_path / "out", [comparison], {}, trainings)

    def rows(name: str) -> list[list[str]]:
        text = (tmp_path / f"out/plots/{name}.csv").read_text(encoding="utf-8")
        return [line.split(",") for line in text.splitlines()]

    assert rows("scores") == [
        ["system", "score"],
        *([f"{name} (iid)", str(row.score)] for name, row in comparison.summaries.items()),
    ]
    head, *pairs = rows("confusion")
    assert head == ["task", "adapter"]
    firsts = [
        [item.task, item.route.first or "none"]
        for task in PRIMARIES
        for item in items_of("routed", task)
    ]
    assert sorted(pairs) == sorted(firsts)
    assert rows("learning") == [
        ["task", "step", "loss", "validation_loss"],
        ["colours", "2", "2.0", "3.0"],  # alone has both
    ]


def test_the_same_scores_give_the_same_bytes_and_read_back(scores: Path, tmp_path: Path) -> None:
    comparison = compared(scores)
    for name in ("first", "second"):
        write_comparisons(tmp_path / name, [compared(scores)], {"sums": NOVELTY}, {})

    assert read_comparisons(tmp_path / "first") == [comparison]
    assert read_novelties(tmp_path / "first", ["sums"]) == {"sums": NOVELTY}
    files = [path for path in (tmp_path / "first").rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        other = tmp_path / "second" / file.relative_to(tmp_path / "first")
        assert file.read_bytes() == other.read_bytes()


def test_each_setting_is_compared_on_its_own_items(scores: Path, tmp_path: Path) -> None:
    items = in_prompts([item for task in PRIMARIES for item in items_of("routed", task)])
    systems = entries(["single", "routed"])
    write_system(scores / "composite_2/single", "single", items[:12])
    write_system(scores / "composite_2/routed", "routed", items)
    with pytest.raises(DataError, match="composite_2/routed: other items than those of single"):
        compared(scores, setting="composite_2", systems=systems)

    write_system(scores / "composite_2/routed", "routed", items[:12])
    found = compared(scores, setting="composite_2", systems=systems)
    assert found.differences == dict.fromkeys(systems, Difference(0, 0, 0))
    write_comparisons(tmp_path / "out", [compared(scores), found], {}, {})
    assert read_comparisons(tmp_path / "out")[1] == found
    write_metrics(tmp_path / "out.json", tmp_path / "metrics.json", [compared(scores), found])
    for name in ("out.json", "metrics.json"):
        assert list(json.loads((tmp_path / name).read_text())) == ["iid", "composite_2"]
