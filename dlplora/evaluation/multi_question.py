"""The settings `composite_…`: several questions in one prompt, each answer scored by itself."""

from collections.abc import Mapping, Sequence

import numpy as np

from dlplora.data.balance import composite_text, draw_parts
from dlplora.engine.answers import Answer, Passage, Request, raising
from dlplora.engine.runner import Runner
from dlplora.errors import DataError
from dlplora.evaluation.items import TaskItems, score_answer
from dlplora.evaluation.settings import NUM_QUESTIONS, primaries_in
from dlplora.params.inputs import Task
from dlplora.records.examples import Example
from dlplora.records.scores import ItemScore
from dlplora.sampling import Sampling
from dlplora.systems.system import System
from dlplora.words import Advance, Setting


def ask_prompts(
    runner: Runner,
    system: System,
    tests: Sequence[TaskItems],
    *,
    setting: Setting,
    count: int,
    seed: int,
    advance: Advance,
) -> list[ItemScore]:
    """Answer prompts of several questions by a system that runs; score answer i by reference i.

    A system that is told the task is told that of each question. Prompts that the model cannot
    read together with their answers are left out; `DataError` if none is left.
    """
    tasks = {test.name: test.task for test in tests}
    drawn = draw_prompts(tests, questions=NUM_QUESTIONS[setting], count=count, seed=seed)
    asked = {
        number: (parts, request)
        for number, parts in enumerate(drawn)
        if runner.reads(request := _request(parts, tasks, system))
    }
    if not asked:
        raise DataError(
            f"{setting}: none of {count} prompts fits the base model together with its answers; "
            f"take the setting out of the systems in params.yaml"
        )
    advance(len(drawn) - len(asked))
    answers: dict[int, Answer] = {}
    for piece in raising(runner.run([request for _, request in asked.values()])):
        if piece.answer is not None:
            answers[piece.number] = piece.answer
            advance(setting=setting)
    primaries = primaries_in(setting, tasks)
    return [
        score_answer(
            example,
            passage.text,
            passage.route,
            task=tasks[example.task],
            primary=primaries[example.task],
            item_id=f"{number}:{place}:{example.id}",
            prompt=request.prompt,
        )
        for (number, (parts, request)), answer in zip(
            asked.items(), (answers[row] for row in range(len(asked))), strict=True
        )
        for place, (example, passage) in enumerate(
            zip(parts, _filled(answer.parts, len(parts)), strict=True)
        )
    ]


def draw_prompts(
    tests: Sequence[TaskItems], *, questions: int, count: int, seed: int
) -> list[list[Example]]:
    """Draw the questions of `count` prompts, each of different tasks."""
    rng = np.random.default_rng([seed, questions])
    examples = {test.name: test.examples for test in tests}
    return [draw_parts(examples, questions, rng) for _ in range(count)]


def _request(parts: Sequence[Example], tasks: Mapping[str, Task], system: System) -> Request:
    limit = sum(tasks[part.task].max_new_tokens + 1 for part in parts)
    return Request(
        composite_text([part.question for part in parts]),
        Sampling(max_new_tokens=limit),
        system.told([part.task for part in parts]),
        system.policy,
        num_answers=len(parts),
    )


def _filled(parts: Sequence[Passage], count: int) -> list[Passage]:
    """Return as many answers as questions; those that were not begun are empty."""
    missing = [Passage("", parts[-1].route)] * (count - len(parts))
    return [*parts, *missing]
