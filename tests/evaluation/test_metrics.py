"""Metrics against their formulas and against sacrebleu and rouge-score directly."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import sqrt
from statistics import NormalDist

import numpy as np
import pytest
import sacrebleu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from dlplora.errors import ParamsError
from dlplora.evaluation.metrics import (
    METRICS,
    NUM_RESAMPLES,
    bleu_counts,
    bleu_of_counts,
    exact_match,
    interval,
    resampled_scores,
    resampled_tasks,
    rouge,
    score_task,
    sentence_bleu,
    summarise,
    task_metrics,
    wilson,
)
from dlplora.records import examples
from dlplora.records.examples import Kind, check_primary
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.records.scores import (
    ItemScore,
    OptionScores,
    Summary,
    summary_from_json,
    summary_to_json,
)
from dlplora.words import Primary
from tests.data.test_scripts import SAME

ANSWERS = [
    ("the cat sat on the mat today", ["the cat sat on a mat today", "a cat is on the mat"]),
    (
        "Dr. Smith paid $3.50, didn't he?",
        ["Dr. Smith paid $3.50 and left", "he paid", "Smith paid"],
    ),
    ("", ["something was expected here", "or else this"]),
    ("one two three four five six seven", ["one two three four five six seven"]),
    ("running dogs run", ["the dog runs", "dogs running"]),
    ("no overlap whatsoever", ["entirely different words here now"]),
    ("up", ["up", "upwards"]),
    ("  the colour is red .", ["the colour is red.", "red"]),
    ("the sky is a deep blue tonight", ["the sea is a deep grey today"]),  # no 4 words match
]
N = len(ANSWERS)


def free(
    number: int,
    text: str,
    references: Sequence[str],
    *,
    task: str = "qa",
    primary: Primary = "rougeL",
) -> ItemScore:
    return ItemScore(
        id=f"{task}{number}",
        task=task,
        prompt="?",
        prediction=text,
        references=tuple(references),
        score=METRICS[primary].of_item(text, references, None),
        generated=text,
        options=None,
        route=Route((task,), (1.0,)),
    )


def chosen(number: int, pick: str, right: str, *, said: str = "", task: str = "mcq") -> ItemScore:
    options = OptionScores(("red", "blue"), (-1.0, -2.0), (1, 1), (3, 4))
    return ItemScore(
        id=f"{task}{number}",
        task=task,
        prompt="?",
        prediction=pick,
        references=(right,),
        score=float(pick == right),
        generated=said,
        options=options,
        route=Route((task,), (1.0,)),
    )


def free_items(*, primary: Primary = "rougeL", task: str = "qa") -> list[ItemScore]:
    return [
        free(number, text, references, task=task, primary=primary)
        for number, (text, references) in enumerate(ANSWERS)
    ]


def mcq_items(right: int, n: int) -> list[ItemScore]:
    return [chosen(number, "red", "red" if number < right else "blue") for number in range(n)]


def scored(scores: Sequence[float], *, task: str = "qa") -> list[ItemScore]:
    item = free(0, "up", ["up"], task=task)
    return [replace(item, id=f"{task}{place}", score=s) for place, s in enumerate(scores)]


def corpus_bleu(items: Sequence[ItemScore]) -> float:
    """Score by sacrebleu itself; items with fewer references have gaps in the streams."""
    most = max(len(item.references) for item in items)
    streams = [
        [item.references[k] if k < len(item.references) else None for item in items]
        for k in range(most)
    ]
    texts = [item.generated for item in items]
    return sacrebleu.BLEU(effective_order=True).corpus_score(texts, streams).score / 100


@pytest.mark.parametrize(
    ("text", "references", "expected"),
    [
        ("down", ["down"], 1.0),
        (" down\n", ["up", "down "], 1.0),
        ("Down", ["down"], 0.0),
        ("down there", ["down"], 0.0),
        ("", ["down"], 0.0),
    ],
)
def test_exact_match_asks_for_any_reference_white_space_around_it_aside(
    text: str, references: list[str], expected: float
) -> None:
    assert exact_match(text, references) == expected


@pytest.mark.parametrize(("text", "references"), ANSWERS)
def test_rouge_equals_rouge_score_against_the_best_reference(
    text: str, references: list[str]
) -> None:
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    one_by_one = [scorer.score(reference, text) for reference in references]

    found = rouge(text, references)

    assert set(found) == {"rouge1", "rougeL"}
    for name, value in found.items():
        assert value == max(scores[name].fmeasure for scores in one_by_one)


def test_rouge_takes_the_best_reference_of_each_metric_by_itself() -> None:
    found = rouge("a b c d", ["d c b a", "x a b c"])

    assert found["rouge1"] == pytest.approx(1.0)
    assert found["rougeL"] == pytest.approx(0.75)


def test_rouge_stems_words() -> None:
    assert rouge("running dogs", ["run dog"])["rouge1"] == pytest.approx(1.0)


@pytest.mark.parametrize(("text", "references"), ANSWERS)
def test_sentence_bleu_equals_sacrebleu(text: str, references: list[str]) -> None:
    expected = sacrebleu.sentence_bleu(text, references).score / 100

    assert sentence_bleu(text, references) == pytest.approx(expected)


def test_summed_counts_give_the_corpus_bleu_of_sacrebleu_with_several_references() -> None:
    items = free_items()

    found = bleu_of_counts(bleu_counts(items).sum(0).tolist())

    assert found == pytest.approx(corpus_bleu(items), abs=1e-12)
    assert 0 < found < 1


@settings(deadline=None)
@example(rows=[N - 1])
@given(rows=st.lists(st.integers(0, len(ANSWERS) - 1), min_size=1, max_size=12))
def test_counts_of_any_draw_of_items_give_the_corpus_bleu_of_that_draw(rows: list[int]) -> None:
    items = free_items()

    found = bleu_of_counts(bleu_counts(items)[rows].sum(0).tolist())

    assert found == pytest.approx(corpus_bleu([items[row] for row in rows]), abs=1e-12)


def test_task_metrics_of_free_answers_are_means_and_the_corpus_bleu() -> None:
    items = free_items()

    metrics = task_metrics(items)

    rouges = [rouge(text, references) for text, references in ANSWERS]
    assert metrics == pytest.approx(
        {
            "exact_match": 2 / N,
            "bleu": corpus_bleu(items),
            "rouge1": sum(row["rouge1"] for row in rouges) / N,
            "rougeL": sum(row["rougeL"] for row in rouges) / N,
        }
    )


def test_multiple_choice_counts_the_chosen_option_and_the_generated_text_apart() -> None:
    items = [
        chosen(0, "red", "red", said="red"),
        chosen(1, "red", "red", said="blue"),
        chosen(2, "blue", "red", said="red"),
        chosen(3, "red", "red", said="it is red"),
    ]

    assert task_metrics(items) == {"accuracy": 0.75, "exact_match": 0.5}


@settings(deadline=None)
@given(n=st.integers(1, 400), data=st.data())
def test_wilson_equals_the_closed_formula(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    z, p = NormalDist().inv_cdf(0.975), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))

    assert wilson(successes, n) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_the_interval_holds_the_middle_95_percent() -> None:
    shuffled = np.random.default_rng(0).permutation(np.arange(1001.0))

    assert interval(shuffled) == pytest.approx((25, 975))


def test_a_bootstrap_interval_covers_the_mean_and_shrinks_with_more_items() -> None:
    few = np.random.default_rng(0).uniform(size=20).tolist()
    many = few * 16

    low, high = interval(resampled_scores(scored(few), "rougeL", seed=0))
    low_many, high_many = interval(resampled_scores(scored(many), "rougeL", seed=0))

    mean, deviation = np.mean(few), np.std(few)
    assert low < mean < high
    assert (high - low) / 2 == pytest.approx(1.96 * deviation / sqrt(20), rel=0.1)
    assert (high_many - low_many) / 2 == pytest.approx(1.96 * deviation / sqrt(320), rel=0.1)


def test_resamples_depend_on_the_seed_and_the_task_alone() -> None:
    scores = np.random.default_rng(0).uniform(size=9).tolist()
    first = resampled_scores(scored(scores), "rougeL", seed=0)

    assert first.shape == (NUM_RESAMPLES,)
    np.testing.assert_array_equal(first, resampled_scores(scored(scores), "rougeL", seed=0))
    assert not np.array_equal(first, resampled_scores(scored(scores), "rougeL", seed=1))
    other_task = resampled_scores(scored(scores, task="other"), "rougeL", seed=0)
    assert not np.array_equal(first, other_task)


def test_two_systems_on_the_same_items_get_the_same_draws() -> None:
    scores = np.random.default_rng(0).uniform(size=9)

    one = resampled_scores(scored(scores.tolist()), "rougeL", seed=0)
    other = resampled_scores(scored((1 - scores).tolist()), "exact_match", seed=0)

    np.testing.assert_allclose(one + other, 1)
    assert one.std() > 0.01


def test_corpus_bleu_is_computed_anew_in_each_resample() -> None:
    items = free_items(primary="bleu")
    indicated = [  # 1 for one item, 0 for the others: shows how often it was drawn
        resampled_scores(scored(row), "rougeL", seed=3) for row in np.eye(N).tolist()
    ]
    drawn = (np.stack(indicated, axis=1) * N).round().astype(int)

    found = resampled_scores(items, "bleu", seed=3)

    assert (drawn.sum(1) == N).all()
    for place in range(0, NUM_RESAMPLES, 500):
        resample = [
            item for item, times in zip(items, drawn[place], strict=True) for _ in range(times)
        ]
        assert found[place] == pytest.approx(corpus_bleu(resample), abs=1e-12)


@pytest.mark.parametrize("primary", ["accuracy", "exact_match"])
def test_proportions_have_the_interval_of_wilson(primary: str) -> None:
    items = [
        chosen(number, "red", "red" if number < 7 else "blue", said="red") for number in range(10)
    ]

    score = score_task(items, primary, np.zeros(NUM_RESAMPLES))

    assert (score.n, score.kind, score.primary, score.score) == (10, "mcq", primary, 0.7)
    assert (score.score_low, score.score_high) == wilson(7, 10)


@pytest.mark.parametrize("primary", ["rougeL", "bleu"])
def test_means_and_bleu_have_the_interval_of_the_bootstrap(primary: str) -> None:
    resampled = np.linspace(0.2, 0.4, 1001)

    score = score_task(free_items(), primary, resampled)

    assert (score.kind, score.primary) == ("qa", primary)
    assert score.score == score.metrics[primary]
    assert (score.score_low, score.score_high) == pytest.approx((0.205, 0.395))


@pytest.mark.parametrize(
    ("kind", "primary", "title"),
    [
        ("qa", "accuracy", "free answers"),
        ("mcq", "rougeL", "multiple choice"),
        ("mcq", "bleu", "multiple choice"),
    ],
)
def test_a_primary_metric_that_does_not_fit_the_items_is_refused(
    kind: Kind, primary: Primary, title: str
) -> None:
    with pytest.raises(
        ParamsError, match=rf"tasks\.mine\.primary is {primary}.*{title}.*exact_match"
    ):
        check_primary(primary, kind, task="mine")


PRIMARIES: dict[str, Primary] = {"mcq": "accuracy", "qa": "rougeL"}


def sum_up(
    items: Sequence[ItemScore], primaries: Mapping[str, Primary], *, system: str, seed: int
) -> Summary:
    resampled = resampled_tasks(items, primaries, seed=seed)
    return summarise(items, primaries, resampled, setting="iid", system=system, seed=seed)


def test_the_score_of_a_system_is_the_mean_over_tasks_whatever_their_sizes() -> None:
    items = [*mcq_items(9, 30), *free_items()]

    summary = sum_up(items, PRIMARIES, system="s", seed=0)

    rouge_l = sum(rouge(text, references)["rougeL"] for text, references in ANSWERS) / N
    assert summary.tasks["mcq"].score == pytest.approx(0.3)
    assert summary.tasks["qa"].score == pytest.approx(rouge_l)
    assert summary.score == pytest.approx((0.3 + rouge_l) / 2)
    assert (summary.tasks["mcq"].n, summary.tasks["qa"].n) == (30, N)
    assert (summary.setting, summary.system, summary.seed) == ("iid", "s", 0)


def test_the_interval_of_a_system_is_stratified_by_task() -> None:
    items = [*mcq_items(9, 30), *free_items()]

    summary = sum_up(items, PRIMARIES, system="s", seed=5)

    of_mcq = resampled_scores(items[:30], "accuracy", seed=5)
    of_qa = resampled_scores(items[30:], "rougeL", seed=5)
    low, high = np.quantile((of_mcq + of_qa) / 2, [0.025, 0.975])
    assert (summary.score_low, summary.score_high) == pytest.approx((low, high))
    assert low < summary.score < high


@pytest.mark.parametrize(
    ("route", "adapters"), [(BASE_ROUTE, 0), (Route(("mcq", "qa"), (0.5, 0.5)), 2)]
)
def test_systems_that_prefer_no_adapter_have_no_routing_accuracy(
    route: Route, adapters: int
) -> None:
    items = [replace(item, route=route) for item in [*mcq_items(1, 3), *free_items()]]

    summary = sum_up(items, PRIMARIES, system="s", seed=0)

    assert summary.routing_accuracy is None
    assert summary.adapters_per_prompt == adapters


def test_routing_accuracy_is_the_share_of_items_whose_heaviest_adapter_is_their_own() -> None:
    routes = [
        Route(("mcq",), (1.0,)),
        Route(("qa", "mcq"), (0.3, 0.7)),
        Route(("qa",), (1.0,)),
        Route(("mcq", "qa"), (0.5, 0.5)),  # a tie prefers none
        BASE_ROUTE,
    ]
    items = [
        replace(item, route=route) for item, route in zip(mcq_items(2, 5), routes, strict=True)
    ]

    summary = sum_up(items, {"mcq": "accuracy"}, system="s", seed=0)

    assert summary.routing_accuracy == pytest.approx(2 / 5)
    assert summary.adapters_per_prompt == pytest.approx(6 / 5)


def test_summary_json_has_the_keys_of_the_design_and_reads_back() -> None:
    items = [*mcq_items(2, 5), *free_items()]
    summary = sum_up(items, PRIMARIES, system="s", seed=1)

    values = json.loads(json.dumps(summary_to_json(summary), allow_nan=False))

    assert list(values) == [
        "setting",
        "system",
        "seed",
        "score",
        "score_low",
        "score_high",
        "routing_accuracy",
        "adapters_per_prompt",
        "tasks",
    ]
    common = {"n", "kind", "primary", "score", "score_low", "score_high"}
    assert set(values["tasks"]["mcq"]) == common | {"accuracy", "exact_match"}
    assert set(values["tasks"]["qa"]) == common | {"exact_match", "bleu", "rouge1", "rougeL"}
    for task, primary in PRIMARIES.items():
        assert values["tasks"][task]["primary"] == primary
        assert values["tasks"][task]["score"] == values["tasks"][task][primary]
    assert summary_from_json(values) == summary


@pytest.mark.parametrize("primary", ["exact_match", "bleu", "rougeL"])
@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_a_right_answer_scores_one_in_any_script(primary: Primary, text: str) -> None:
    assert METRICS[primary].of_item(text, [text], None) == pytest.approx(1)
    other = "Вчера шёл дождь и было холодно" if text == SAME["Korean"] else SAME["Korean"]
    assert METRICS[primary].of_item(other, [text], None) < 0.2
    scores = task_metrics([free(number, text, [text]) for number in range(3)])
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))


def test_the_form_of_an_accent_makes_no_difference() -> None:
    composed, apart = "\u00e9tude", "e\u0301tude"
    for metric in METRICS.values():
        assert metric.of_item(composed, [apart], None) == pytest.approx(1)
    assert exact_match(composed, [apart]) == exact_match(apart, [composed]) == 1
    assert exact_match("2\u00b2", ["22"]) == exact_match("A", ["a"]) == 0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("3 + 4 = 7\n#### 7", 1),
        ("another way: 8 - 1 = 7 #### 7 ", 1),
        ("#### 3 no, #### 7", 1),
        ("7", 1),
        ("3 + 4 = 8\n#### 8", 0),
        ("3 + 4 = 7", 0),
        ("", 0),
    ],
)
def test_exact_match_reads_what_follows_the_last_mark(text: str, score: float) -> None:
    references = ["3 + 4 = 7\n#### 7"]
    assert exact_match(text, references, "####") == score
    item = replace(free(0, text, references, primary="exact_match"), answer_after="####")
    assert task_metrics([item])["exact_match"] == score


def test_every_metric_is_of_a_kind_of_task() -> None:
    assert {name for names in examples.PRIMARIES.values() for name in names} == METRICS.keys()
