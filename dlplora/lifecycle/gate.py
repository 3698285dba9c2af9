"""The gate: is a retrained model good enough to replace the one in production?

Both answer the same test items, so that differences are paired. The candidate passes if the lower
bound of the 95 % interval of its mean difference over tasks lies above a margin (a test of
non-inferiority), and if no task is significantly worse: sign-flip permutation tests, one-sided, at
a family-wise error of 5 % by Holm's method.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from dlplora.evaluation.metrics import (
    Numbers,
    bleu_counts,
    bleu_of_counts,
    interval,
    resampled_tasks,
)
from dlplora.params.project import Gate
from dlplora.records.scores import ItemScore
from dlplora.records.verdict import Decision, Difference, Judgement, Verdict
from dlplora.words import Primary

_ALPHA = 0.05
_NUM_PERMUTATIONS = 9_999
_PASSING = ("better", "within noise")


def compare_items(
    candidate: Sequence[ItemScore],
    promoted: Sequence[ItemScore],
    primaries: Mapping[str, Primary],
    gate: Gate,
    *,
    seed: int,
) -> tuple[Difference, dict[str, Difference]]:
    """Compare two models on the same items: over all tasks of `primaries`, and on each.

    A task of fewer than `minimum_items` cannot be judged alone. All such tasks count in the mean as
    one, by their items, and not at all if they have too few together: an interval of a few items
    says nothing.
    """
    by_id = {item.id: item for item in promoted}
    paired = [by_id[item.id] for item in candidate]
    mine = {task: [item for item in candidate if item.task == task] for task in primaries}
    theirs = {task: [item for item in paired if item.task == task] for task in primaries}
    scores = resampled_tasks(candidate, primaries, seed=seed)
    references = resampled_tasks(paired, primaries, seed=seed)
    judged = [task for task, items in mine.items() if len(items) >= gate.minimum_items]
    worse = holm(
        {task: _p_of_worse(_scores(mine[task]) - _scores(theirs[task]), seed) for task in judged}
    )
    tasks = {}
    for task, items in mine.items():
        mean = _task_score(items, primaries[task])
        reference = _task_score(theirs[task], primaries[task])
        low, high = interval(scores[task] - references[task])
        verdict: Verdict = "within noise" if mean >= reference else "worse within noise"
        if task not in judged:
            verdict = "cannot judge"
        elif task in worse:
            verdict = "significantly worse"
        elif low > 0:
            verdict = "better"
        tasks[task] = Difference(verdict, len(items), mean, reference, mean - reference, low, high)
    differences = {task: scores[task] - references[task] for task in tasks}
    return _overall(tasks, differences, gate), tasks


def _overall(
    tasks: Mapping[str, Difference], resampled: Mapping[str, Numbers], gate: Gate
) -> Difference:
    small = [task for task, row in tasks.items() if row.n < gate.minimum_items]
    groups = [[task] for task in tasks if task not in small]
    if sum(tasks[task].n for task in small) >= gate.minimum_items:
        groups.append(small)
    can_judge, groups = bool(groups), groups or [small]
    weights = {
        task: tasks[task].n / sum(tasks[each].n for each in group) / len(groups)
        for group in groups
        for task in group
    }
    candidate = sum(weight * tasks[task].candidate for task, weight in weights.items())
    promoted = sum(weight * tasks[task].promoted for task, weight in weights.items())
    low, high = interval(
        np.sum([weight * resampled[task] for task, weight in weights.items()], axis=0)
    )
    num_items = sum(tasks[task].n for task in weights)
    is_worse = low <= gate.margin and high < 0
    verdict: Verdict = "better" if low > 0 else "within noise"
    if not can_judge:
        verdict = "cannot judge"
    elif is_worse or any(task.verdict == "significantly worse" for task in tasks.values()):
        verdict = "significantly worse"
    elif low <= gate.margin:  # a loss beyond the margin cannot be ruled out
        verdict = "worse within noise" if candidate < promoted else "cannot judge"
    return Difference(verdict, num_items, candidate, promoted, candidate - promoted, low, high)


def nothing_in_common() -> Difference:
    """Return the comparison of models that share no item: it cannot judge."""
    return Difference("cannot judge", 0, *[0.0] * 5)


def holm(p_values: Mapping[str, float]) -> set[str]:
    """Return what is significant at a family-wise error of 5 % (Holm 1979)."""
    found: set[str] = set()
    for name, p_value in sorted(p_values.items(), key=lambda pair: pair[1]):
        if p_value > _ALPHA / (len(p_values) - len(found)):
            break
        found.add(name)
    return found


def _p_of_worse(differences: Numbers, seed: int) -> float:
    """Return how likely a mean as low is if signs are random: of paired scores, one-sided."""
    from scipy.stats import permutation_test

    if not differences.any():
        return 1.0
    tested = permutation_test(
        (differences,),
        lambda row, axis: np.mean(row, axis=axis),
        permutation_type="samples",
        alternative="less",
        n_resamples=_NUM_PERMUTATIONS,
        batch=1_000,
        rng=np.random.default_rng(seed),
    )
    return float(tested.pvalue)


def _task_score(items: Sequence[ItemScore], primary: Primary) -> float:
    """Return what `resampled_scores` resamples: of BLEU the corpus's."""
    if primary == "bleu":
        return bleu_of_counts(bleu_counts(items).sum(0).tolist())
    return float(_scores(items).mean())


def _scores(items: Sequence[ItemScore]) -> Numbers:
    scores: Numbers = np.array([item.score for item in items], dtype=np.float64)
    return scores


def items_sha256(items: Sequence[ItemScore], task: str) -> str:
    """Hash which items of a task were judged."""
    ids = sorted(item.id for item in items if item.task == task)
    return hashlib.sha256("".join(ids).encode()).hexdigest()


def times_judged(items: Mapping[str, str], earlier: Sequence[Judgement]) -> int:
    """Count the earlier verdicts on the same items: of the task with the most."""
    return max(
        (sum(each.items.get(task) == found for each in earlier) for task, found in items.items()),
        default=0,
    )


def decide(judgement: Judgement | None, *, approval: bool) -> Decision:
    """Return what becomes of a candidate; the first model, which nothing judges, passes."""
    verdict = "better" if judgement is None else judgement.overall.verdict
    if verdict == "significantly worse":
        return "refused"
    if approval:
        return "awaiting approval"
    is_unsure = judgement is not None and judgement.falls_back_more
    return "promoted" if verdict in _PASSING and not is_unsure else "not promoted"
