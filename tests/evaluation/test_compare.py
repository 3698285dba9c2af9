"""Systems side by side, from small folders of scores."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dlplora.errors import DataError
from dlplora.evaluation.compare import BY_TASK, compare
from dlplora.evaluation.metrics import METRICS, resampled_scores, resampled_tasks, summarise
from dlplora.records.comparison import (
    Comparison,
    Difference,
    read_comparison,
    read_novelties,
    write_comparisons,
)
from dlplora.records.novelty import Novelty
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.records.scores import IID, ItemScore, OptionScores, read_summary, write_scores
from dlplora.words import Primary

NOVELTY = {"mlp": Novelty(60, 40, 0.9, 0.8, 0.7)}
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
    summary = summarise(items, primaries, resampled, setting=IID, system=system, seed=SEED)
    write_scores(folder, items, summary)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Folders of scores: base and single one a task, random and routed whole."""
    folder = tmp_path / "scores"
    for system in ("base", "single"):
        for task in PRIMARIES:
            write_system(folder / IID / system / task, system, items_of(system, task))
    for system in ("random", "routed"):
        items = [item for task in PRIMARIES for item in items_of(system, task)]
        write_system(folder / IID / system, system, items)
    return folder


def compared(scores: Path, systems: Sequence[str] = ("random", "routed")) -> Comparison:
    return compare(
        scores,
        setting=IID,
        primaries=PRIMARIES,
        systems=[*BY_TASK, *systems],
        reference="single",
        seed=SEED,
    )


def test_systems_stand_behind_base_and_single_in_the_order_given(scores: Path) -> None:
    comparison = compared(scores, ["routed", "random"])

    assert list(comparison.summaries) == ["base", "single", "routed", "random"]
    assert list(comparison.differences) == ["base", "single", "routed", "random"]
    assert list(comparison.routing) == ["routed", "random"]
    assert comparison.setting == IID


def test_a_summary_of_the_comparison_is_the_one_that_the_evaluation_wrote(scores: Path) -> None:
    comparison = compared(scores)

    for system in ("random", "routed"):
        assert comparison.summaries[system] == read_summary(scores / IID / system)
    for system in ("base", "single"):
        for task in PRIMARIES:
            alone = read_summary(scores / IID / system / task)
            assert comparison.summaries[system].tasks[task] == alone.tasks[task]
            assert alone.score == alone.tasks[task].score


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
    write_system(scores / IID / "twin", "twin", items)

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
    comparison = compare(
        scores,
        setting=IID,
        primaries={"colours": "accuracy"},
        systems=[*BY_TASK, "routed"],
        reference="single",
        seed=SEED,
    )

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
    write_system(scores / IID / "random", "random", change(items))

    with pytest.raises(DataError, match=r"iid/random: other items than those of single"):
        compared(scores)


def test_base_of_other_items_than_single_is_refused(scores: Path) -> None:
    items = items_of("base", "opposites")[1:]
    write_system(scores / IID / "base" / "opposites", "base", items)

    with pytest.raises(DataError, match=r"iid/base: other items"):
        compared(scores)


def test_a_comparison_reads_back_as_it_was_written(scores: Path, tmp_path: Path) -> None:
    comparison = compared(scores)
    write_comparisons(tmp_path / "comparison", tmp_path / "comparison.json", [comparison], {})

    assert read_comparison(tmp_path / "comparison", IID) == comparison


def test_comparison_json_holds_what_git_keeps(scores: Path, tmp_path: Path) -> None:
    comparison = compared(scores)
    write_comparisons(tmp_path / "comparison", tmp_path / "comparison.json", [comparison], {})

    values = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))

    assert list(values) == [IID]
    assert list(values[IID]) == ["base", "single", "random", "routed"]
    best = comparison.summaries["single"].score
    for system, row in values[IID].items():
        summary = comparison.summaries[system]
        assert row == {
            "score": summary.score,
            "low": summary.score_low,
            "high": summary.score_high,
            "normalised": summary.score / best,
            "routing_accuracy": summary.routing_accuracy,
        }
    assert values[IID]["single"]["normalised"] == 1
    assert values[IID]["base"]["routing_accuracy"] is None
    assert values[IID]["random"]["routing_accuracy"] == pytest.approx(7 / 14)
    assert values[IID]["routed"]["routing_accuracy"] == pytest.approx(10 / 14)


def test_nothing_is_normalised_by_a_single_adapter_that_scores_0(
    scores: Path, tmp_path: Path
) -> None:
    items = [
        replace(item, prediction="blue", generated="blue", score=0.0)
        for item in items_of("single", "colours")
    ]
    write_system(scores / IID / "single" / "colours", "single", items)
    comparison = compare(
        scores,
        setting=IID,
        primaries={"colours": "accuracy"},
        systems=[*BY_TASK, "routed"],
        reference="single",
        seed=SEED,
    )
    write_comparisons(tmp_path / "comparison", tmp_path / "comparison.json", [comparison], {})

    values = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert [row["normalised"] for row in values[IID].values()] == [None] * 3


def test_the_same_scores_give_the_same_bytes(scores: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_comparisons(tmp_path / name, tmp_path / f"{name}.json", [compared(scores)], {})

    for file in ("{}.json", "{}/iid.json"):
        first, second = (tmp_path / file.format(name) for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_each_setting_has_its_own_reference(scores: Path, tmp_path: Path) -> None:
    for system in ("oracle", "keep"):
        items = [item for task in PRIMARIES for item in items_of("routed", task)]
        write_system(
            scores / "composite_2" / system, system, items[: 12 if system == "keep" else 14]
        )
    arguments = {"primaries": PRIMARIES, "reference": "oracle", "seed": SEED}
    with pytest.raises(DataError, match="composite_2/keep: other items than those of oracle"):
        compare(scores, setting="composite_2", systems=["oracle", "keep"], **arguments)  # type: ignore[arg-type]
    found = compare(scores, setting="composite_2", systems=["oracle"], **arguments)  # type: ignore[arg-type]
    assert (found.differences["oracle"].difference, found.reference) == (0, "oracle")
    write_comparisons(
        tmp_path / "out", tmp_path / "out.json", [compared(scores), found], {"sums": NOVELTY}
    )
    assert read_comparison(tmp_path / "out", "composite_2") == found
    assert read_novelties(tmp_path / "out", ["sums"]) == {"sums": NOVELTY}
    assert list(json.loads((tmp_path / "out.json").read_text())) == [IID, "composite_2"]
