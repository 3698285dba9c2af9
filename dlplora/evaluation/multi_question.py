"""The settings `composite_…`: several questions in one prompt, each answer scored by itself."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.errors import DataError
from dlplora.evaluation.items import Prompt, TaskItems
from dlplora.params.inputs import Task
from dlplora.records.examples import Example
from dlplora.records.scores import item_id
from dlplora.sampling import Sampling
from dlplora.systems.system import System
from dlplora.words import NUM_QUESTIONS, Setting


def multi_question_batches(
    runner: Runner,
    system: System,
    tests: Sequence[TaskItems],
    *,
    setting: Setting,
    count: int,
    seed: int,
    batch_size: int,
) -> Iterator[list[Prompt]]:
    """Yield `count` prompts of several questions in batches, the same prompts for every system.

    A system that is told the task is told that of each question. Prompts that the model cannot
    read together with their answers are left out; `DataError` if none is left.
    """
    tasks = {test.name: test.task for test in tests}
    drawn = draw_prompts(tests, questions=NUM_QUESTIONS[setting], count=count, seed=seed)
    prompts = [
        Prompt(
            _request(parts, tasks, system),
            parts,
            [item_id(number, place, part.id) for place, part in enumerate(parts)],
        )
        for number, parts in enumerate(drawn)
        if runner.reads(_whole(parts, tasks))
    ]
    if not prompts:
        raise DataError(
            f"{setting}: none of {count} prompts fits the base model together with its answers; "
            f"take the setting out of the systems in params.yaml"
        )
    for start in range(0, len(prompts), batch_size):
        yield prompts[start : start + batch_size]


def draw_prompts(
    tests: Sequence[TaskItems], *, questions: int, count: int, seed: int
) -> list[list[Example]]:
    """Draw the questions of `count` prompts, each of so many different tasks.

    Tasks take turns to be in one; the others, the questions and their order are drawn by hashes. So
    another task changes none of the prompts that it is not part of.
    """
    examples = {test.name: test.examples for test in tests}

    def rank(*names: object) -> bytes:
        key = "\0".join(map(str, (seed, questions, *names)))
        return hashlib.sha256(key.encode()).digest()

    turns = sorted(examples, key=rank)
    drawn = []
    for number in range(count):
        turn, place = divmod(number, len(turns))
        own = turns[place]
        others = sorted(examples.keys() - {own}, key=partial(rank, own, turn))
        tasks = sorted([own, *others[: questions - 1]], key=partial(rank, own, turn, "order"))
        drawn.append(
            [min(examples[task], key=lambda row: rank(own, turn, row.id)) for task in tasks]
        )
    return drawn


def numbered_text(questions: Sequence[str]) -> str:
    """Number several questions as one prompt."""
    return "\n".join(f"{number}. {text.strip()}" for number, text in enumerate(questions, start=1))


def _request(parts: Sequence[Example], tasks: Mapping[str, Task], system: System) -> Request:
    whole = replace(
        _whole(parts, tasks),
        routes=system.told([part.task for part in parts]),
        policy=system.policy,
    )
    if system.policy != "split":
        return whole
    longest = max(tasks[part.task].max_new_tokens for part in parts)
    sampling = Sampling(max_new_tokens=longest)  # of each question …
    return replace(whole, sampling=sampling, num_answers=1)  # … and the text tells how many


def _whole(parts: Sequence[Example], tasks: Mapping[str, Task]) -> Request:
    """Return what asks all questions in one sequence."""
    return Request(
        numbered_text([part.question for part in parts]),
        Sampling(max_new_tokens=sum(tasks[part.task].max_new_tokens + 1 for part in parts)),
        num_answers=len(parts),
    )
