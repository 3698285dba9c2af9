"""The gate: verdicts on made-up items, against plain loops, enumeration and scipy."""

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement, product
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from dlplora.evaluation.metrics import resampled_scores
from dlplora.lifecycle.gate import (
    compare_items,
    decide,
    holm,
    items_sha256,
    nothing_in_common,
    times_judged,
)
from dlplora.params.project import Gate
from dlplora.records.examples import example_id
from dlplora.records.routes import BASE_ROUTE
from dlplora.records.scores import ItemScore
from dlplora.records.verdict import Decision, Difference, Judgement, Verdict
from dlplora.words import Primary

Scores = Mapping[str, Sequence[float]]


def gate(*, margin: float = -0.02, minimum_items: int = 30) -> Gate:
    return Gate(
        margin=margin,
        minimum_items=minimum_items,
        max_latency_ratio=1.2,
        max_fallback_increase=0.05,
        approval=False,
    )


def items(scores: Scores) -> list[ItemScore]:
    """Make an item of each score; those of a task have the same questions every time."""
    return [
        ItemScore(
            id=example_id(task, str(number)),
            task=task,
            prompt=str(number),
            prediction="x",
            references=("x",),
            score=score,
            generated="x",
            options=None,
            route=BASE_ROUTE,
        )
        for task, row in scores.items()
        for number, score in enumerate(row)
    ]


def compare(
    candidate: Scores, promoted: Scores, rules: Gate | None = None, *, seed: int = 0
) -> tuple[Difference, dict[str, Difference]]:
    primaries: dict[str, Primary] = dict.fromkeys(candidate, "exact_match")
    return compare_items(items(candidate), items(promoted), primaries, rules or gate(), seed=seed)


def right(count: int, of: int) -> list[float]:
    """Score so many of the items 1, the first ones."""
    return [1.0] * count + [0.0] * (of - count)


@pytest.mark.parametrize(
    ("candidate", "promoted", "verdict", "of_task"),
    [
        (right(50, 60), right(10, 60), "better", "better"),
        (right(30, 60), right(30, 60), "within noise", "within noise"),
        (right(60, 60), right(60, 60), "within noise", "within noise"),
        (right(0, 60), right(0, 60), "within noise", "within noise"),
        (right(31, 60), right(30, 60), "within noise", "within noise"),
        (right(299, 300), right(300, 300), "within noise", "worse within noise"),
        (right(28, 60), right(30, 60), "worse within noise", "worse within noise"),
        (right(10, 60), right(50, 60), "significantly worse", "significantly worse"),
        (right(29, 60)[::-1], right(29, 60), "cannot judge", "within noise"),
        (right(28, 60)[::-1], right(29, 60), "worse within noise", "worse within noise"),
        (right(20, 29), right(0, 29), "cannot judge", "cannot judge"),
        (right(0, 29), right(29, 29), "cannot judge", "cannot judge"),
        (right(29, 29), right(29, 29), "cannot judge", "cannot judge"),
        (right(0, 30), right(30, 30), "significantly worse", "significantly worse"),
    ],
)
def test_one_task_is_judged_by_how_far_its_scores_lie_apart(
    candidate: list[float], promoted: list[float], verdict: Verdict, of_task: Verdict
) -> None:
    overall, tasks = compare({"one": candidate}, {"one": promoted})
    assert (overall.verdict, tasks["one"].verdict) == (verdict, of_task)
    for found in (overall, tasks["one"]):
        assert found.n == len(candidate)
        assert found.candidate == pytest.approx(np.mean(candidate))
        assert found.promoted == pytest.approx(np.mean(promoted))
        assert found.difference == pytest.approx(np.mean(candidate) - np.mean(promoted))
        assert found.low <= found.difference + 1e-12
        assert found.high >= found.difference - 1e-12


def test_one_bad_task_among_many_good_ones_makes_the_whole_significantly_worse() -> None:
    names = [f"good_{number}" for number in range(9)]
    candidate = dict.fromkeys(names, right(40, 40)) | {"bad": right(20, 40)}
    promoted = dict.fromkeys(names, right(20, 40)) | {"bad": right(40, 40)}
    overall, tasks = compare(candidate, promoted)
    assert {task: row.verdict for task, row in tasks.items()} == (
        dict.fromkeys(names, "better") | {"bad": "significantly worse"}
    )
    assert overall.verdict == "significantly worse"
    assert overall.low > 0
    without = {task: row for task, row in candidate.items() if task != "bad"}
    assert compare(without, {task: promoted[task] for task in without})[0].verdict == "better"


@pytest.mark.parametrize("num_right", [0, 1])
def test_a_task_of_too_few_items_decides_nothing(num_right: int) -> None:
    candidate = {"large": right(60, 60), "small": right(num_right, 1)}
    promoted = {"large": right(60, 60), "small": right(1 - num_right, 1)}
    overall, tasks = compare(candidate, promoted)
    assert tasks["small"].verdict == "cannot judge"
    assert tasks["large"].verdict == "within noise"
    assert (overall.n, overall.difference, overall.verdict) == (60, 0.0, "within noise")


def test_small_tasks_count_as_one_by_their_items() -> None:
    candidate = {"large": right(60, 60), "one": right(0, 10), "two": right(20, 20)}
    promoted = {"large": right(60, 60), "one": right(10, 10), "two": right(20, 20)}
    overall, _ = compare(candidate, promoted)
    assert overall.n == 90
    assert overall.difference == pytest.approx((0 - 10 / 30) / 2)
    assert overall.verdict == "significantly worse"


def test_small_tasks_together_are_judged_as_a_whole_alone() -> None:
    candidate = {"one": right(20, 20), "two": right(20, 20)}
    promoted = {"one": right(0, 20), "two": right(0, 20)}
    overall, tasks = compare(candidate, promoted)
    assert {row.verdict for row in tasks.values()} == {"cannot judge"}
    assert (overall.verdict, overall.n) == ("better", 40)


def test_the_whole_is_the_mean_over_tasks_and_not_over_items() -> None:
    candidate = {"large": right(0, 300), "small": right(40, 40)}
    promoted = {"large": right(0, 300), "small": right(0, 40)}
    overall, _ = compare(candidate, promoted)
    assert (overall.candidate, overall.promoted, overall.difference) == (0.5, 0.0, 0.5)


@pytest.mark.parametrize("shift", [-0.03, 0.03])
def test_an_equal_shift_of_paired_items_is_found_although_their_intervals_overlap(
    shift: float,
) -> None:
    promoted = np.random.default_rng(0).uniform(0.1, 0.9, size=60)
    candidate = promoted + shift
    intervals = [
        bootstrap((row,), np.mean, rng=np.random.default_rng(0)).confidence_interval
        for row in (candidate, promoted)
    ]
    assert max(row.low for row in intervals) < min(row.high for row in intervals)
    overall, tasks = compare({"one": candidate.tolist()}, {"one": promoted.tolist()})
    expected = "better" if shift > 0 else "significantly worse"
    assert (overall.verdict, tasks["one"].verdict) == (expected, expected)
    assert (overall.low, overall.high) == pytest.approx((shift, shift))
    # The same scores, but each beside another item's: now the noise hides the shift.
    mixed = np.random.default_rng(1).permutation(candidate)
    overall, tasks = compare({"one": mixed.tolist()}, {"one": promoted.tolist()})
    assert tasks["one"].difference == pytest.approx(shift)
    assert overall.low < -0.02 < 0 < overall.high
    assert overall.verdict == ("cannot judge" if shift > 0 else "worse within noise")
    assert tasks["one"].verdict == ("within noise" if shift > 0 else "worse within noise")


def test_the_interval_is_that_of_the_paired_differences() -> None:
    rng = np.random.default_rng(0)
    one = {task: rng.uniform(size=50) for task in ("a", "b")}
    other = {task: np.clip(row + rng.normal(scale=0.2, size=50), 0, 1) for task, row in one.items()}
    overall, tasks = compare(
        {task: row.tolist() for task, row in one.items()},
        {task: row.tolist() for task, row in other.items()},
    )
    for task, found in tasks.items():
        reference = bootstrap(
            (one[task] - other[task],), np.mean, method="percentile", rng=np.random.default_rng(1)
        ).confidence_interval
        assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.005)
    reference = bootstrap(
        [one[task] - other[task] for task in one],
        lambda a, b, axis: (np.mean(a, axis=axis) + np.mean(b, axis=axis)) / 2,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (overall.low, overall.high) == pytest.approx((reference.low, reference.high), abs=0.005)


def test_each_task_is_tested_as_all_signs_of_its_differences_enumerated() -> None:
    rules = gate(minimum_items=1)
    for differences in combinations_with_replacement((-1.0, 0.0, 1.0), 6):
        candidate = [max(value, 0.0) for value in differences]
        promoted = [max(-value, 0.0) for value in differences]
        sums = [
            sum(sign * value for sign, value in zip(signs, differences, strict=True))
            for signs in product((-1, 1), repeat=len(differences))
        ]
        p_value = sum(total <= sum(differences) for total in sums) / len(sums)
        _, tasks = compare({"one": candidate}, {"one": promoted}, rules)
        is_worse = tasks["one"].verdict == "significantly worse"
        assert is_worse == (p_value <= 0.05), differences


def test_the_more_tasks_there_are_the_worse_one_has_to_be() -> None:
    rules, same = gate(minimum_items=1), right(5, 5)
    # All five of five worse: p = 1/32, enough for one task and too little for two.
    assert compare({"bad": right(0, 5)}, {"bad": same}, rules)[1]["bad"].verdict == (
        "significantly worse"
    )
    both = compare({"bad": right(0, 5), "same": same}, {"bad": same, "same": same}, rules)
    assert both[1]["bad"].verdict == "worse within noise"
    # Two such tasks are no more than one of them by Bonferroni's rule, nor by Holm's.
    both = compare({"bad": right(0, 5), "same": right(0, 5)}, {"bad": same, "same": same}, rules)
    assert {row.verdict for row in both[1].values()} == {"worse within noise"}
    # A task of too few items is none of those that are tested.
    few = gate(minimum_items=5)
    both = compare({"bad": right(0, 5), "few": right(4, 4)}, {"bad": same, "few": same[:4]}, few)
    assert both[1]["bad"].verdict == "significantly worse"


@pytest.mark.parametrize("margin", [-0.5, -0.1, -0.02, 0.0])
def test_a_candidate_passes_where_the_lower_bound_lies_above_the_margin(margin: float) -> None:
    for num_right in range(25, 60, 3):
        overall, tasks = compare(
            {"one": right(num_right, 60)}, {"one": right(40, 60)}, gate(margin=margin)
        )
        is_passed = overall.low > margin and tasks["one"].verdict != "significantly worse"
        assert (overall.verdict in ("better", "within noise")) == is_passed
        assert (overall.verdict == "better") == (overall.low > 0)
        if is_passed:
            continue
        if overall.high < 0 or tasks["one"].verdict == "significantly worse":
            assert overall.verdict == "significantly worse"
        elif num_right < 40:
            assert overall.verdict == "worse within noise"
        else:  # no worse, but a loss cannot be ruled out
            assert overall.verdict == "cannot judge"


def test_a_loss_that_is_sure_but_within_the_margin_is_let_pass() -> None:
    promoted = {task: np.linspace(0.2, 0.8, 20).tolist() for task in ("one", "two")}
    for loss, expected in ((0.01, "within noise"), (0.03, "significantly worse")):
        candidate = {task: [score - loss for score in row] for task, row in promoted.items()}
        overall, tasks = compare(candidate, promoted)
        assert {row.verdict for row in tasks.values()} == {"cannot judge"}  # too few items each
        assert overall.high < 0
        assert overall.verdict == expected


def test_neither_the_order_of_items_nor_of_tasks_matters() -> None:
    rng = np.random.default_rng(0)
    candidate = items({task: rng.uniform(size=40) for task in ("a", "b", "c")})
    promoted = items({task: rng.uniform(0.0, 0.6, size=40) for task in ("a", "b", "c")})
    primaries: dict[str, Primary] = dict.fromkeys(("a", "b", "c"), "exact_match")
    overall, tasks = compare_items(candidate, promoted, primaries, gate(), seed=0)
    order = rng.permutation(len(candidate))
    backwards = dict(reversed(primaries.items()))
    again, of_tasks = compare_items(
        [candidate[place] for place in order],
        [promoted[place] for place in order],
        backwards,
        gate(),
        seed=0,
    )
    assert list(of_tasks) == list(backwards)
    for found, expected in ((again, overall), *((of_tasks[task], tasks[task]) for task in tasks)):
        assert (found.verdict, found.n) == (expected.verdict, expected.n)
        means = (found.candidate, found.promoted, found.difference)
        assert means == pytest.approx(
            (expected.candidate, expected.promoted, expected.difference), abs=1e-12
        )
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_items_of_other_tasks_are_left_out() -> None:
    scores = {"one": right(30, 40), "other": right(0, 40)}
    primaries: dict[str, Primary] = {"one": "exact_match"}
    found = compare_items(items(scores), items(scores), primaries, gate(), seed=0)
    alone = {"one": scores["one"]}
    assert found == compare(alone, alone)


def test_the_same_items_and_seed_give_the_same_verdict() -> None:
    rng = np.random.default_rng(0)
    one, other = ({"one": rng.uniform(size=40).tolist()} for _ in range(2))
    assert compare(one, other, seed=3) == compare(one, other, seed=3)
    low, again = (compare(one, other, seed=seed)[0].low for seed in (3, 4))
    assert low != again
    assert low == pytest.approx(again, abs=0.02)


def test_equal_systems_with_random_flips_are_rarely_called_significantly_worse() -> None:
    rng = np.random.default_rng(0)
    draws, rules = 120, gate(minimum_items=10)
    num_whole = num_tasks = 0
    for _ in range(draws):
        truth = {task: rng.integers(2, size=11) for task in ("a", "b")}
        one, other = (
            {task: (row ^ (rng.random(11) < 0.3)).tolist() for task, row in truth.items()}
            for _ in range(2)
        )
        overall, tasks = compare(one, other, rules)
        num_whole += overall.verdict == "significantly worse"
        num_tasks += any(row.verdict == "significantly worse" for row in tasks.values())
    slack = 3 * (0.05 * 0.95 / draws) ** 0.5
    assert num_tasks / draws <= 0.05 + slack
    assert num_whole / draws <= 0.05 + slack


@pytest.mark.parametrize(
    ("p_values", "significant"),
    [
        ({}, ""),
        ({"a": 0.05}, "a"),
        ({"a": 0.0501}, ""),
        ({"a": 0.025, "b": 0.05}, "ab"),
        ({"a": 0.026, "b": 0.026}, ""),
        ({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}, "ad"),
        ({"a": 0.9, "b": 0.0125, "c": 0.0166, "d": 0.025}, "bcd"),
        ({"a": 0.02, "b": 0.02, "c": 0.02, "d": 0.02}, ""),
        ({"a": 0.0, "b": 1.0}, "a"),
        ({"a": 1.0, "b": 1.0}, ""),
    ],
)
def test_holm_finds_by_hand_what_is_significant(
    p_values: dict[str, float], significant: str
) -> None:
    assert holm(p_values) == set(significant)


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.01, 0.0125, 0.05 / 3, 0.025, 0.05])),
        max_size=8,
    )
)
def test_holm_finds_what_adjusted_p_values_find_between_bonferroni_and_no_correction(
    p_values: dict[str, float],
) -> None:
    found = holm(p_values)
    count = len(p_values)
    bonferroni = {name for name, p_value in p_values.items() if p_value <= 0.05 / max(count, 1)}
    uncorrected = {name for name, p_value in p_values.items() if p_value <= 0.05}
    assert bonferroni <= found <= uncorrected
    ranked = sorted(p_values.values())
    expected = set()
    for name, p_value in p_values.items():  # significant if all that is at most as large is, too
        steps = [(each, place) for place, each in enumerate(ranked) if each <= p_value]
        if all(each <= 0.05 / (count - place) for each, place in steps):
            expected.add(name)
    tied = {name for name, each in p_values.items() if ranked.count(each) > 1}
    assert found - tied == expected - tied
    assert holm(dict(reversed(p_values.items()))) - tied == found - tied


DECISIONS: dict[Verdict, tuple[Decision, Decision]] = {  # without approval and with it
    "better": ("promoted", "awaiting approval"),
    "within noise": ("promoted", "awaiting approval"),
    "cannot judge": ("not promoted", "awaiting approval"),
    "worse within noise": ("not promoted", "awaiting approval"),
    "significantly worse": ("refused", "refused"),
}


def judgement(verdict: Verdict, sha256s: Mapping[str, str] | None = None) -> Judgement:
    whole = Difference(verdict, 40, 0.5, 0.5, 0.0, 0.0, 0.0)
    return Judgement("v0.0.1", "a", "b", whole, {}, dict(sha256s or {}), 0, 1.0, ())


def test_there_is_a_decision_on_every_verdict() -> None:
    assert set(DECISIONS) == set(get_args(Verdict))


@pytest.mark.parametrize("verdict", DECISIONS)
def test_what_is_significantly_worse_is_refused_and_with_approval_all_else_awaits_it(
    verdict: Verdict,
) -> None:
    found = tuple(decide(judgement(verdict), approval=approval) for approval in (False, True))
    assert found == DECISIONS[verdict]


def test_the_first_model_passes_for_nothing_judges_it() -> None:
    assert decide(None, approval=False) == "promoted"
    assert decide(None, approval=True) == "awaiting approval"


def test_models_without_a_common_item_cannot_be_judged() -> None:
    assert nothing_in_common().verdict == "cannot judge"
    assert nothing_in_common().n == 0


def test_verdicts_on_the_same_items_are_counted_by_the_task_judged_most_often() -> None:
    earlier = [
        judgement("better", {"a": "1", "b": "1"}),
        judgement("within noise", {"a": "1", "b": "2"}),
        judgement("cannot judge", {"c": "1"}),
        judgement("cannot judge", {}),
    ]
    assert times_judged({"a": "1"}, earlier) == 2
    assert times_judged({"a": "1", "b": "2"}, earlier) == 2
    assert times_judged({"b": "2"}, earlier) == 1
    assert times_judged({"a": "3", "b": "3"}, earlier) == 0
    assert times_judged({"a": "1", "b": "2"}, []) == 0
    assert times_judged({}, earlier) == 0


def test_the_hash_of_judged_items_is_of_their_set_alone() -> None:
    some = items({"a": right(1, 3), "b": right(1, 3)})
    assert items_sha256(some, "a") == items_sha256(some[::-1], "a")
    assert items_sha256(some, "a") == items_sha256(items({"a": right(3, 3)}), "a")
    others = [items_sha256(some, "b"), items_sha256(some[1:], "a"), items_sha256([], "a")]
    assert len({items_sha256(some, "a"), *others}) == 4


def test_a_judgement_tells_its_verdict_its_numbers_and_what_was_left_out() -> None:
    rows = {
        "bad": Difference("significantly worse", 40, 0.25, 0.75, -0.5, -0.7, -0.3),
        "few": Difference("cannot judge", 3, 0.0, 0.0, 0.0, 0.0, 0.0),
        "same": Difference("within noise", 40, 0.5, 0.5, 0.0, -0.1, 0.1),
    }
    whole = Difference("significantly worse", 83, 0.25, 0.417, -0.167, -0.2, -0.1)
    told = str(
        Judgement("v0.0.4", "mine", "theirs", whole, rows, {}, 2, 1.0, ("Left out: 5 items.",))
    )
    assert "\n" not in told
    assert told.startswith("Significantly worse: on 83 test items of 3 tasks, mine scores 0.250 ")
    assert "theirs of v0.0.4 0.417" in told
    assert "-0.167 (95 % interval -0.200 to -0.100)" in told
    assert "bad -0.500 (-0.700 to -0.300)" in told
    assert "Of too few items to be judged alone: few (" in told
    assert "same" not in told
    assert "judged 2 times before" in told
    assert told.endswith("Left out: 5 items.")


def test_a_task_of_bleu_is_told_by_the_score_that_its_interval_is_of() -> None:
    def answered(*texts: str) -> list[ItemScore]:
        made = items({"one": [0.0] * len(texts)})
        values = [vars(item) | {"generated": text} for item, text in zip(made, texts, strict=True)]
        return [ItemScore(**value | {"references": ("a b c d e f g h",)}) for value in values]

    one = answered(*["a b c d e f g h"] * 20, *["x"] * 20)
    other = answered(*["a b c d e f g h"] * 40)
    _, tasks = compare_items(one, other, {"one": "bleu"}, gate(), seed=0)
    corpus = np.mean(resampled_scores(one, "bleu", seed=0))
    assert tasks["one"].candidate == pytest.approx(corpus, abs=0.1)
