"""Selection, weighting and calibration against enumeration and sums done by hand."""

from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlplora.params.systems import TopK, TopP, Weighting
from dlplora.routing.base import (
    ClassifierRouter,
    Probabilities,
    calibration_error,
    fallback_threshold,
    nucleus_size,
    select,
    weigh,
)

WEIGHTINGS: tuple[Weighting, ...] = ("renormalise", "softmax_probabilities", "softmax_logits")
Counts = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


def top_p(p: float, weights: Weighting = "renormalise") -> TopP:
    return TopP(p=p, weights=weights)


def top_k(k: int, weights: Weighting = "renormalise") -> TopK:
    return TopK(k=k, weights=weights)


def names(count: int) -> list[str]:
    return [f"task_{place}" for place in range(count)]


class Told:
    """A classifier that gives the probabilities it was told, by text."""

    def __init__(self, table: dict[str, list[float]], labels: tuple[str, ...]) -> None:
        self.table = table
        self.labels = labels

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        return np.array([self.table[text] for text in texts])


@settings(deadline=None)
@given(counts=Counts, data=st.data())
def test_top_p_keeps_the_smallest_of_all_subsets_that_reaches_p(
    counts: list[int], data: st.DataObject
) -> None:
    total = sum(counts)
    wanted = data.draw(st.integers(1, total))
    subsets = [
        subset
        for size in range(len(counts) + 1)
        for subset in combinations(range(len(counts)), size)
    ]
    reaching = [subset for subset in subsets if sum(counts[i] for i in subset) >= wanted]
    smallest = min(map(len, reaching))

    route = select(np.array(counts) / total, names(len(counts)), top_p(wanted / total))

    kept = tuple(sorted(int(name.removeprefix("task_")) for name in route.adapters))
    assert len(kept) == smallest
    assert kept in reaching
    heaviest = max(sum(counts[i] for i in subset) for subset in reaching if len(subset) == smallest)
    assert sum(counts[i] for i in kept) == heaviest


@settings(deadline=None)
@given(counts=Counts, data=st.data())
def test_nucleus_size_is_the_first_count_whose_running_sum_reaches_p(
    counts: list[int], data: st.DataObject
) -> None:
    ranked = sorted(counts, reverse=True)
    wanted = data.draw(st.integers(1, sum(ranked)))
    by_hand, reached = 0, 0
    while reached < wanted:
        reached += ranked[by_hand]
        by_hand += 1

    assert nucleus_size(np.array(ranked) / sum(ranked), wanted / sum(ranked)) == by_hand


@pytest.mark.parametrize(
    ("p", "size"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 3)]
)
def test_nucleus_of_a_toy_has_the_size_worked_out_by_hand(p: float, size: int) -> None:
    assert nucleus_size(np.array([0.5, 0.3, 0.2]), p) == size


def test_all_are_kept_when_rounding_leaves_the_sum_short_of_p() -> None:
    assert nucleus_size(np.array([0.5, 0.3, 0.1]), 1.0) == 3


@settings(deadline=None)
@given(counts=Counts, k=st.integers(1, 9))
def test_top_k_keeps_the_k_likeliest_and_never_more_than_there_are(
    counts: list[int], k: int
) -> None:
    route = select(np.array(counts) / sum(counts), names(len(counts)), top_k(k))

    likeliest = sorted(range(len(counts)), key=lambda i: (-counts[i], i))[:k]
    assert route.adapters == tuple(f"task_{i}" for i in likeliest)
    assert len(route.adapters) == min(k, len(counts))


@pytest.mark.parametrize("how", [top_k(3), top_p(0.7)])
def test_equal_probabilities_keep_the_order_of_the_labels(how: TopK | TopP) -> None:
    route = select(np.full(4, 0.25), ["d", "a", "c", "b"], how)

    assert route.adapters == ("d", "a", "c")
    assert route.weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert route.first is None


def test_a_route_keeps_the_weights_beside_their_adapters_and_the_first_confidence() -> None:
    route = select(np.array([0.1, 0.6, 0.3]), ["a", "b", "c"], top_k(2))

    assert route.adapters == ("b", "c")
    assert route.weights == pytest.approx((2 / 3, 1 / 3))
    assert route.confidence == pytest.approx(0.6)


@settings(deadline=None)
@given(counts=Counts, weighting=st.sampled_from(WEIGHTINGS))
def test_weights_sum_to_1_and_rank_as_the_probabilities_do(
    counts: list[int], weighting: Weighting
) -> None:
    kept = np.array(sorted(counts, reverse=True)) / sum(counts)

    weights = weigh(kept, weighting)

    assert weights.shape == kept.shape
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= 0).all()
    assert (np.diff(weights) <= 1e-12).all()


def test_softmax_of_probabilities_gives_the_figures_of_the_paper() -> None:
    weights = weigh(np.array([0.59, 0.01]), "softmax_probabilities")

    assert weights == pytest.approx([0.64, 0.36], abs=0.005)
    powers = [np.e**0.59, np.e**0.01]
    assert weights == pytest.approx([power / sum(powers) for power in powers])


def test_renormalising_divides_by_the_kept_sum() -> None:
    assert weigh(np.array([0.59, 0.01]), "renormalise") == pytest.approx([59 / 60, 1 / 60])


@settings(deadline=None)
@given(counts=Counts)
def test_softmax_of_logits_equals_renormalising(counts: list[int]) -> None:
    kept = np.array(counts) / sum(counts)

    by_logits = weigh(kept, "softmax_logits")

    assert by_logits == pytest.approx(weigh(kept, "renormalise"), abs=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_one_kept_adapter_has_the_whole_weight(
    weighting: Literal["renormalise", "softmax_probabilities", "softmax_logits"],
) -> None:
    assert select(np.array([0.2, 0.8]), ["a", "b"], top_k(1, weighting)).weights == (1.0,)


def test_a_classifier_router_routes_each_text_by_its_own_row() -> None:
    table = {"x": [0.9, 0.1, 0.0], "y": [0.0, 0.45, 0.55]}
    router = ClassifierRouter(Told(table, ("a", "b", "c")), top_p(0.6))

    alone = [route for text in ("y", "x", "y") for route in router.route([text])]

    assert router.route(["y", "x", "y"]) == alone
    assert alone[0].adapters == ("c", "b")
    assert alone[1].adapters == ("a",)


def test_calibration_error_of_a_toy_is_the_sum_worked_out_by_hand() -> None:
    confidence = np.array([0.95, 0.99, 0.61, 0.65])  # two bins: [14/15, 1] and [9/15, 10/15)
    right = np.array([True, False, True, True])

    gap_high = abs(1 / 2 - (0.95 + 0.99) / 2)
    gap_low = abs(1 - (0.61 + 0.65) / 2)
    assert calibration_error(confidence, right) == pytest.approx((2 * gap_high + 2 * gap_low) / 4)


def test_calibration_error_weighs_bins_by_their_texts() -> None:
    confidence = np.array([0.5, 0.5, 0.5, 1.0])
    right = np.array([True, True, True, False])

    assert calibration_error(confidence, right) == pytest.approx(3 / 4 * 0.5 + 1 / 4 * 1)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=20),
    st.lists(st.integers(0, 20), min_size=1, max_size=20),
)
def test_no_threshold_sends_more_texts_where_they_belong(
    known: list[tuple[int, bool]], strange: list[int]
) -> None:
    confidence = np.array([twentieths / 20 for twentieths, _ in known])
    right, unknown = np.array([ok for _, ok in known]), np.array(strange) / 20

    def good(threshold: float) -> float:
        kept = [ok and sure >= threshold for sure, ok in zip(confidence, right, strict=True)]
        return float(0.9 * np.mean(kept) + 0.1 * np.mean(unknown < threshold))

    found = fallback_threshold(confidence, right, unknown)
    grid = [place / 40 for place in range(41)]
    assert good(found) >= max(map(good, grid)) - 1e-9
    assert all(good(lower) < good(found) + 1e-9 for lower in grid if lower < found)


def test_gaps_within_a_bin_cancel_and_gaps_across_bins_do_not() -> None:
    one_bin = calibration_error(np.array([0.5, 0.5]), np.array([True, False]))
    two_bins = calibration_error(np.array([0.5, 0.9]), np.array([True, False]))

    assert one_bin == pytest.approx(0)
    assert two_bins == pytest.approx((0.5 + 0.9) / 2)


def test_there_are_15_bins() -> None:
    apart = calibration_error(np.array([0.61, 0.69]), np.array([True, False]))
    together = calibration_error(np.array([0.69, 0.71]), np.array([True, False]))

    assert apart == pytest.approx((0.39 + 0.69) / 2)  # 10/15 lies between
    assert together == pytest.approx(0.70 - 0.50)  # both lie between 10/15 and 11/15


def test_confidence_1_that_is_always_right_has_no_calibration_error() -> None:
    assert calibration_error(np.ones(7), np.ones(7, dtype=bool)) == 0
