"""One system in all its settings: answers, scores, seconds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.engine.runner import Runner
from dlplora.evaluation.answer_store import Answered, AnswerStore
from dlplora.evaluation.answering import Answering
from dlplora.evaluation.items import Prompt, TaskItems, score_answer
from dlplora.evaluation.metrics import resampled_tasks, summarise
from dlplora.evaluation.multi_question import multi_question_batches
from dlplora.evaluation.settings import primaries_in
from dlplora.evaluation.single_items import item_batches
from dlplora.params.systems import Evaluation
from dlplora.records.scores import ItemScore, Summary, write_scores
from dlplora.systems.system import System
from dlplora.words import NUM_QUESTIONS, Advance, Setting


@dataclass(frozen=True)
class Scores:
    """What one system scored in one setting: its items, their summary, the seconds of answering.

    Seconds of answers that were found are those that they once took.
    """

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
    store: AnswerStore,
    advance: Advance,
) -> Iterator[tuple[Setting, Scores]]:
    """Ask a system in each of its settings, and yield what it scored there."""
    with system.running(max_batch_size=evaluation.batch_size) as runner:
        answering = Answering(runner, system, store)
        for setting in settings:
            seconds = 0.0
            left = num_prompts([setting], tests, evaluation)
            items: list[ItemScore] = []
            for batch in _batches(runner, system, tests, setting, evaluation, seed):
                found = answering.answer(batch)
                seconds += found.seconds
                items += _score(batch, found.answered, tests, setting)
                advance(len(batch), setting=setting, task=items[-1].task)
                left -= len(batch)
            if left:  # prompts that do not fit
                advance(left)
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


def _batches(
    runner: Runner,
    system: System,
    tests: Sequence[TaskItems],
    setting: Setting,
    evaluation: Evaluation,
    seed: int,
) -> Iterator[list[Prompt]]:
    if NUM_QUESTIONS[setting] == 1:
        return item_batches(
            runner.base, system, tests, setting=setting, batch_size=evaluation.batch_size
        )
    return multi_question_batches(
        runner,
        system,
        tests,
        setting=setting,
        count=evaluation.multi_question_prompts,
        seed=seed,
        batch_size=evaluation.batch_size,
    )


def _score(
    batch: Sequence[Prompt],
    answered: Sequence[Answered],
    tests: Sequence[TaskItems],
    setting: Setting,
) -> list[ItemScore]:
    tasks = {test.name: test.task for test in tests}
    primaries = primaries_in(setting, tasks)
    return [
        score_answer(
            example,
            text,
            route,
            task=tasks[example.task],
            primary=primaries[example.task],
            item_id=item_id,
            prompt=str(prompt.request.prompt),
            options=found.options,
        )
        for prompt, found in zip(batch, answered, strict=True)
        for example, item_id, (text, route) in zip(
            prompt.examples, prompt.item_ids, found.filled(len(prompt.examples)), strict=True
        )
    ]


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
