"""One system in all its settings: answers, scores, seconds."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.engine.runner import Runner
from dlplora.evaluation.items import TaskItems
from dlplora.evaluation.metrics import resampled_tasks, summarise
from dlplora.evaluation.multi_question import ask_prompts
from dlplora.evaluation.settings import NUM_QUESTIONS, primaries_in
from dlplora.evaluation.single_items import ask_items
from dlplora.params.systems import Evaluation
from dlplora.records.scores import ItemScore, Summary, write_scores
from dlplora.systems.system import System
from dlplora.words import Advance, Setting


@dataclass(frozen=True)
class Scores:
    """What one system scored in one setting: its items, their summary, and the seconds taken."""

    items: list[ItemScore]
    summary: Summary
    seconds: float

    def save(self, folder: Path) -> None:
        """Write items.parquet and summary.json."""
        write_scores(folder, self.items, self.summary)


def evaluate(
    system: System,
    tests: Sequence[TaskItems],
    *,
    name: str,
    settings: Sequence[Setting],
    evaluation: Evaluation,
    seed: int,
    advance: Advance,
) -> Iterator[tuple[Setting, Scores]]:
    """Ask a system in each of its settings, and yield what it scored there."""
    with system.running(places=evaluation.batch_size) as runner:
        for setting in settings:
            start = time.perf_counter()
            items = _ask(runner, system, tests, setting, evaluation, seed, advance)
            seconds = time.perf_counter() - start
            yield setting, _scores(items, tests, setting, name, seed, seconds)


def num_prompts(
    settings: Sequence[Setting], tests: Sequence[TaskItems], evaluation: Evaluation
) -> int:
    """Count the prompts of all settings."""
    alone = sum(len(test.examples) for test in tests)
    return sum(
        alone if NUM_QUESTIONS[setting] == 1 else evaluation.multi_question_prompts
        for setting in settings
    )


def _ask(
    runner: Runner,
    system: System,
    tests: Sequence[TaskItems],
    setting: Setting,
    evaluation: Evaluation,
    seed: int,
    advance: Advance,
) -> list[ItemScore]:
    if NUM_QUESTIONS[setting] == 1:
        return ask_items(runner, system, tests, batch_size=evaluation.batch_size, advance=advance)
    return ask_prompts(
        runner,
        system,
        tests,
        setting=setting,
        count=evaluation.multi_question_prompts,
        seed=seed,
        advance=advance,
    )


def _scores(
    items: list[ItemScore],
    tests: Sequence[TaskItems],
    setting: Setting,
    name: str,
    seed: int,
    seconds: float,
) -> Scores:
    met = {item.task for item in items}
    primaries = {
        task: primary
        for task, primary in primaries_in(setting, {t.name: t.task for t in tests}).items()
        if task in met
    }
    resampled = resampled_tasks(items, primaries, seed=seed)
    summary = summarise(items, primaries, resampled, setting=setting, system=name, seed=seed)
    return Scores(items, summary, seconds)
