"""Candidate and promoted model, asked the same test items by the code that is here."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.errors import ModelError, unreadable
from dlplora.evaluation.answer_store import AnswerStore, kept_answers
from dlplora.evaluation.items import TaskItems
from dlplora.evaluation.run import evaluate
from dlplora.lifecycle.gate import compare_items, items_sha256, nothing_in_common, times_judged
from dlplora.lifecycle.model import answers_sha256, question_sha256
from dlplora.params.load import load_served
from dlplora.params.project import PARAMS_FILE, Params
from dlplora.records.examples import examples_path, read_examples
from dlplora.records.model_card import read_items, read_version_name
from dlplora.records.scores import ItemScore
from dlplora.records.verdict import Judgement
from dlplora.runtime import set_up
from dlplora.sampling import Sampling
from dlplora.systems.load import Systems
from dlplora.systems.system import System
from dlplora.words import Advance

_ROUNDING = 1e-9
_NUM_TIMED = 8  # prompts that are asked both in turns


def judge(
    data: Path,
    promoted: Path,
    params: Params,
    *,
    earlier: Sequence[Judgement],
    progress: Callable[[str, int], AbstractContextManager[Advance]],
) -> Judgement:
    """Compare the pipeline's result in a folder with a model, each by its default system.

    Test items that either was trained on are left out. `earlier` are the verdicts there were.
    Raises `ModelError` if either is not there.
    """
    against = read_version_name(promoted)
    tests, notes = shared_items(data, promoted, params)
    served = load_served(promoted / PARAMS_FILE)
    names = (params.default_system, served.default_system)
    if not tests:
        told = ("The models have no test item in common.", *notes)
        return Judgement(against, *names, nothing_in_common(), {}, {}, 0, None, told)

    def answered(system: System, name: str, folder: Path) -> list[ItemScore]:
        total = sum(len(test.examples) for test in tests)
        kept = _kept_answers(data, folder / "base", params)
        with kept as answers, progress(name, total) as advance:
            ((_, found),) = evaluate(
                system,
                tests,
                name=name,
                settings=["iid"],
                evaluation=params.evaluation,
                seed=params.seed,
                store=answers,
                advance=advance,
            )
        return found.items

    candidate, other = (Systems(folder, [None]).named(None) for folder in (data, promoted))
    mine, theirs = answered(candidate, names[0], data), answered(other, names[1], promoted)
    primaries = {test.name: test.task.primary for test in tests}
    overall, tasks = compare_items(mine, theirs, primaries, params.gate, seed=params.seed)
    ratio = latency_ratio(candidate, other, tests)
    if ratio > params.gate.max_latency_ratio:
        notes.append(
            f"Slower: answers take {ratio:.2f} times as long as those of {against} (limit "
            f"{params.gate.max_latency_ratio})."
        )
    rates = fallback_rate(candidate, tests), fallback_rate(other, tests)
    falls_back_more = rates[0] - rates[1] > params.gate.max_fallback_increase + _ROUNDING
    if falls_back_more:
        notes.append(
            f"Unsure more often: of these questions, {rates[0]:.1%} would go to the base model, of "
            f"{against} {rates[1]:.1%} (limit: {params.gate.max_fallback_increase:.1%} more)."
        )
    items = {task: items_sha256(mine, task) for task in tasks}
    return Judgement(
        against,
        *names,
        overall,
        tasks,
        items,
        judged_before=times_judged(items, earlier),
        latency_ratio=ratio,
        notes=tuple(notes),
        fallback_rates=rates,
        falls_back_more=falls_back_more,
    )


def _kept_answers(data: Path, base: Path, params: Params) -> AnswerStore:
    """Return the answers that evaluation kept, by the code in `data`, of a base model."""
    place, max_mib = set_up(params.runtime, seed=params.seed), params.answers.max_mib
    try:
        return kept_answers(
            code=data / "code/evaluate.json", base=base, place=place, max_mib=max_mib
        )
    except OSError as error:
        raise ModelError(f"{data}: no results of the pipeline: {unreadable(error)}") from error


def shared_items(data: Path, promoted: Path, params: Params) -> tuple[list[TaskItems], list[str]]:
    """Return the test items that both models have and neither was trained on, and notes."""
    mine, theirs = read_items(data / "model"), read_items(promoted)
    trained = {item.question_sha256 for item in [*mine, *theirs] if item.split != "test"}
    known = {
        (item.task, item.question_sha256): item.answers_sha256
        for item in theirs
        if item.split == "test"
    }
    tests, num_leaked, num_changed = [], 0, 0
    for task in sorted(params.tasks):
        examples = read_examples(examples_path(data / "examples", "test", task))
        both = [row for row in examples if (task, question_sha256(row)) in known]
        fresh = [row for row in both if question_sha256(row) not in trained]
        kept = [row for row in fresh if answers_sha256(row) == known[task, question_sha256(row)]]
        num_leaked += len(both) - len(fresh)
        num_changed += len(fresh) - len(kept)
        if kept:
            tests.append(TaskItems(kept, params.tasks[task]))
    new = sorted(set(params.tasks) - {item.task for item in theirs})
    gone = sorted({item.task for item in theirs} - set(params.tasks))
    notes = [f"Not judged, for they are new: {', '.join(new)}."] if new else []
    notes += [f"No longer there: {', '.join(gone)}."] if gone else []
    judged = {test.name for test in tests} | set(new)
    if tests and (apart := sorted(set(params.tasks) - judged)):
        notes.append(f"Without test items in common: {', '.join(apart)}.")
    if num_leaked:
        notes.append(
            f"Left out: {num_leaked} test items that stand in the training data of one of the two."
        )
    if num_changed:
        notes.append(f"Left out: {num_changed} test items whose answers were changed.")
    return tests, notes


def fallback_rate(system: System, tests: Sequence[TaskItems]) -> float:
    """Return the share of the items' questions that a system leaves to the base model.

    An item is asked in another wording, if it has one.
    """
    if system.classifier is None:
        return 0.0
    texts = [row.reworded or row.question for test in tests for row in test.examples]
    confidence = system.classifier.probabilities(texts).max(1)
    return float((confidence < system.fallback_below).mean())


def latency_ratio(candidate: System, promoted: System, tests: Sequence[TaskItems]) -> float:
    """Ask both some prompts in turns; return the median of the ratios of their seconds."""
    prompts = [
        Request(test.examples[place].question, Sampling(max_new_tokens=test.task.max_new_tokens))
        for place in range(_NUM_TIMED)
        for test in tests
        if place < len(test.examples)
    ][:_NUM_TIMED]
    with candidate.running(cache_mib=0) as one, promoted.running(cache_mib=0) as other:
        for runner in (one, other):
            runner.generate(prompts[:1])  # what is made once
        return median(_seconds(one, prompt) / _seconds(other, prompt) for prompt in prompts)


def _seconds(runner: Runner, request: Request) -> float:
    start = time.perf_counter()
    runner.generate([request])
    return time.perf_counter() - start
