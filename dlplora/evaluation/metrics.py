"""Metrics of generated answers and chosen options, with 95 % intervals.

All are fractions of 1. Proportions have Wilson's interval; means and corpus BLEU a bootstrap
over items, stratified by task. Intervals cover the choice of items, not of training seeds.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics.bleu import BLEU

from dlplora.data.scripts import StemmedWords, bleu_tokenizer
from dlplora.records.scores import ItemScore, Summary, TaskScore
from dlplora.words import Primary

NUM_RESAMPLES = 10_000
Numbers = NDArray[np.float64]


def exact_match(text: str, references: Sequence[str], answer_after: str | None = None) -> float:
    """Return 1 if the text is one of the references.

    White space around them and the form of letters with accents (NFC) make no difference. With
    `answer_after` all are what follows its last place, where they have it.
    """
    given = {final_answer(reference, answer_after) for reference in references}
    return float(final_answer(text, answer_after) in given)


def final_answer(text: str, answer_after: str | None) -> str:
    """Return what follows the last `answer_after` in a text, or all of it."""
    final = text.rpartition(answer_after)[2] if answer_after else text
    return _nfc(final.strip())


@cache
def _bleu(tokenizer: str) -> BLEU:
    return BLEU(effective_order=True, tokenize=tokenizer)


def _sentence_bleu(text: str, references: Sequence[str], tokenizer: str) -> Any:
    return _bleu(tokenizer).sentence_score(_nfc(text), list(map(_nfc, references)))


def sentence_bleu(text: str, references: Sequence[str]) -> float:
    """Return sacrebleu's sentence BLEU: for an item's row, never for a task's score.

    The tokenizer is sacrebleu's for the script of the references.
    """
    tokenizer = bleu_tokenizer("".join(references))
    return float(_sentence_bleu(text, references, tokenizer).score) / 100


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], tokenizer=StemmedWords())


def rouge(text: str, references: Sequence[str]) -> dict[str, float]:
    """Return the F1 of ROUGE-1 and ROUGE-L against the reference that fits best, each.

    Words are those of any script; of ASCII text they are rouge-score's own.
    """
    scores = _rouge_scorer().score_multi(list(map(_nfc, references)), _nfc(text))
    return {name: float(score.fmeasure) for name, score in scores.items()}


@dataclass(frozen=True)
class Metric:
    """A metric that can be a task's primary one (`PRIMARIES` tells of which kinds).

    `of_item` maps a text, its references and the task's `answer_after` to the item's score.
    """

    of_item: Callable[[str, Sequence[str], str | None], float]
    is_proportion: bool


METRICS: dict[Primary, Metric] = {
    "accuracy": Metric(
        lambda text, references, _: exact_match(text, references), is_proportion=True
    ),
    "exact_match": Metric(exact_match, is_proportion=True),
    "bleu": Metric(
        lambda text, references, _: sentence_bleu(text, references), is_proportion=False
    ),
    "rougeL": Metric(
        lambda text, references, _: rouge(text, references)["rougeL"], is_proportion=False
    ),
}


def bleu_counts(items: Sequence[ItemScore]) -> NDArray[np.int64]:
    """Count for each item what corpus BLEU adds up: 4 matches, 4 totals, 2 lengths (n, 10).

    The tokenizer is sacrebleu's for the script of all references.
    """
    tokenizer = bleu_tokenizer("".join(text for item in items for text in item.references))
    rows = []
    for item in items:
        score = _sentence_bleu(item.generated, item.references, tokenizer)
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows, dtype=np.int64)


def bleu_of_counts(counts: Sequence[int]) -> float:
    """Return sacrebleu's corpus BLEU of summed counts (10,).

    Where all answers are too short for n-grams of an order, it is left out.
    """
    matches, totals, lengths = counts[:4], counts[4:8], counts[8:]
    score = BLEU.compute_bleu(
        list(matches),
        list(totals),
        sys_len=lengths[0],
        ref_len=lengths[1],
        smooth_method="exp",
        effective_order=True,
    )
    return float(score.score) / 100


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(round(successes), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def task_metrics(items: Sequence[ItemScore]) -> dict[str, float]:
    """Return every metric that fits a task's items."""
    exact = float(
        np.mean([exact_match(row.generated, row.references, row.answer_after) for row in items])
    )
    if items[0].options is not None:
        right = [exact_match(item.prediction, item.references) for item in items]
        return {"accuracy": float(np.mean(right)), "exact_match": exact}
    rouges = [rouge(item.generated, item.references) for item in items]
    return {
        "exact_match": exact,
        "bleu": bleu_of_counts(bleu_counts(items).sum(0).tolist()),
        "rouge1": float(np.mean([row["rouge1"] for row in rouges])),
        "rougeL": float(np.mean([row["rougeL"] for row in rouges])),
    }


def resampled_scores(items: Sequence[ItemScore], primary: Primary, *, seed: int) -> Numbers:
    """Return a task's score in each resample of its items (NUM_RESAMPLES,).

    The draws depend on the seed, the task and the number of items alone: two systems on the
    same items get the same draws, so that the difference of their rows is paired.
    """
    key = int.from_bytes(hashlib.sha256(items[0].task.encode()).digest()[:8], "big")
    rng = np.random.default_rng([seed, key])
    rows = rng.integers(len(items), size=(NUM_RESAMPLES, len(items)))
    if primary != "bleu":
        means: Numbers = np.array([item.score for item in items])[rows].mean(1)
        return means
    sums = bleu_counts(items)[rows].sum(1).tolist()
    return np.array([bleu_of_counts(row) for row in sums])


def interval(resampled: Numbers) -> tuple[float, float]:
    """Return the middle 95 % of resampled scores."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def score_task(items: Sequence[ItemScore], primary: Primary, resampled: Numbers) -> TaskScore:
    """Sum up one task's items."""
    metrics = task_metrics(items)
    n = len(items)
    if METRICS[primary].is_proportion:
        low, high = wilson(metrics[primary] * n, n)
    else:
        low, high = interval(resampled)
    return TaskScore(
        n=n,
        kind="qa" if items[0].options is None else "mcq",
        primary=primary,
        score=metrics[primary],
        score_low=low,
        score_high=high,
        metrics=metrics,
    )


def resampled_tasks(
    items: Sequence[ItemScore], primaries: Mapping[str, Primary], *, seed: int
) -> dict[str, Numbers]:
    """Return the resampled scores of each task that `primaries` names."""
    return {
        task: resampled_scores([item for item in items if item.task == task], primary, seed=seed)
        for task, primary in primaries.items()
    }


def mean_over_tasks(resampled: Mapping[str, Numbers]) -> Numbers:
    """Return a system's score in each resample: the mean over its tasks (NUM_RESAMPLES,)."""
    mean: Numbers = np.mean(list(resampled.values()), axis=0)
    return mean


def summarise(
    items: Sequence[ItemScore],
    primaries: Mapping[str, Primary],
    resampled: Mapping[str, Numbers],
    *,
    setting: str,
    system: str,
    seed: int,
) -> Summary:
    """Sum up the items of one system over the tasks that `primaries` names.

    `resampled` is what `resampled_tasks` returns for them. There is no accuracy of routing where
    no route names a task.
    """
    tasks = {
        task: score_task([item for item in items if item.task == task], primary, resampled[task])
        for task, primary in primaries.items()
    }
    low, high = interval(mean_over_tasks(resampled))
    routes = [item.route for item in items if not item.route.per_token]
    firsts = {route.first for route in routes}
    right = [item.route.first == item.task for item in items]
    return Summary(
        setting=setting,
        system=system,
        seed=seed,
        score=float(np.mean([task.score for task in tasks.values()])),
        score_low=low,
        score_high=high,
        routing_accuracy=float(np.mean(right)) if firsts & primaries.keys() else None,
        adapters_per_prompt=(
            float(np.mean([len(route.adapters) for route in routes])) if routes else None
        ),
        tasks=tasks,
    )
