"""The setting `iid`: each test item by itself, its options scored and its answer generated."""

from collections.abc import Iterator, Sequence

from dlplora.engine.requests import Request
from dlplora.evaluation.items import Prompt, TaskItems
from dlplora.models import Base
from dlplora.params.inputs import Task
from dlplora.records.examples import Example, check_primary
from dlplora.sampling import Sampling
from dlplora.systems.system import System


def item_batches(
    base: Base, system: System, tests: Sequence[TaskItems], *, batch_size: int
) -> Iterator[list[Prompt]]:
    """Yield the prompts of all test items, in batches.

    A batch holds items of one task in item order, the same for every system, so that who
    shares a batch is no difference between systems.
    """
    for test in tests:
        check_primary(test.task.primary, test.examples[0].kind, task=test.name)
    for test in tests:
        for start in range(0, len(test.examples), batch_size):
            examples = test.examples[start : start + batch_size]
            yield [_prompt(base, system, example, test.task) for example in examples]


def _prompt(base: Base, system: System, example: Example, task: Task) -> Prompt:
    room = base.room(base.chat.prompt(example.question))
    sampling = Sampling(max_new_tokens=int(min(task.max_new_tokens, room)))
    request = Request(example.question, sampling, system.told([example.task]))
    return Prompt(request, [example], [example.id], tuple(example.options or ()))
