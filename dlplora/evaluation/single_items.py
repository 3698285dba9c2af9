"""The setting `iid`: each test item by itself, its options weighed and its answer generated."""

from collections.abc import Sequence

from dlplora.engine.answers import Request
from dlplora.engine.runner import Runner
from dlplora.evaluation.items import TaskItems, score_answer
from dlplora.params.inputs import Task
from dlplora.records.examples import Example, check_primary
from dlplora.records.scores import ItemScore
from dlplora.sampling import Sampling
from dlplora.systems.system import System
from dlplora.words import Advance


def ask_items(
    runner: Runner,
    system: System,
    tests: Sequence[TaskItems],
    *,
    batch_size: int,
    advance: Advance,
) -> list[ItemScore]:
    """Answer every test item of each task by a system that runs, and score the answers.

    A batch holds items of one task in item order, the same for every system, so that who
    shares a batch is no difference between systems.
    """
    for test in tests:
        check_primary(test.task.primary, test.examples[0].kind, task=test.name)
    items: list[ItemScore] = []
    for test in tests:
        for start in range(0, len(test.examples), batch_size):
            examples = test.examples[start : start + batch_size]
            items += _ask_batch(runner, system, examples, test.task)
            advance(len(examples), task=test.name)
    return items


def _ask_batch(
    runner: Runner, system: System, examples: Sequence[Example], task: Task
) -> list[ItemScore]:
    prompts = [runner.base.chat.prompt(example.question) for example in examples]
    limits = [int(min(task.max_new_tokens, runner.base.room(prompt))) for prompt in prompts]
    requests = [
        Request(example.question, Sampling(max_new_tokens=limit), system.told([example.task]))
        for example, limit in zip(examples, limits, strict=True)
    ]
    batch = runner.begin(requests, prompts)
    routes = batch.routes
    weighed = batch.score_options([example.options for example in examples if example.options])
    answers = runner.finish(batch, prompts, requests)
    return [
        score_answer(
            example,
            answers[place].text,
            routes[place],
            task=task,
            primary=task.primary,
            item_id=example.id,
            prompt=example.question,
            options=weighed[place] if weighed else None,
        )
        for place, example in enumerate(examples)
    ]
