"""Settings of single questions: each test item by itself, its answer generated."""

from collections.abc import Iterator, Sequence

from dlplora.data.wordings import check_distinct
from dlplora.engine.requests import Request
from dlplora.errors import DataError
from dlplora.evaluation.items import Prompt, TaskItems
from dlplora.models import Base
from dlplora.params.inputs import Task
from dlplora.records.examples import Example, check_primary
from dlplora.sampling import Sampling
from dlplora.systems.system import System
from dlplora.words import Setting


def item_batches(
    base: Base, system: System, tests: Sequence[TaskItems], *, setting: Setting, batch_size: int
) -> Iterator[list[Prompt]]:
    """Yield the prompts of all test items that the setting has a question of, in batches.

    A batch holds items of one task in item order, the same for every system, so that who
    shares a batch is no difference between systems. Options are weighed in `iid`.

    Raises `DataError` if no item has such a question, or if two tasks have the same.
    """
    for test in tests:
        check_primary(test.task.primary, test.examples[0].kind, task=test.name)
    if setting == "reworded":
        check_distinct({test.name: test.examples for test in tests})
    asked = [
        [
            (example, question)
            for example in test.examples
            if (question := _question(example, setting)) is not None
        ]
        for test in tests
    ]
    if not any(asked):
        lacks = "a bare question" if setting == "no_template" else "another wording"
        raise DataError(
            f"setting {setting}: no test item has {lacks}; give tasks some (docs/inputs.md), or "
            f"take the setting out of the systems in params.yaml"
        )
    for test, own in zip(tests, asked, strict=True):
        for start in range(0, len(own), batch_size):
            yield [
                _prompt(base, system, example, question, test.task, weighs=setting == "iid")
                for example, question in own[start : start + batch_size]
            ]


def _question(example: Example, setting: Setting) -> str | None:
    """Return how a setting asks an item; None if the item has no such question."""
    if setting == "no_template":
        return example.bare
    return example.reworded if setting == "reworded" else example.question


def _prompt(
    base: Base, system: System, example: Example, question: str, task: Task, *, weighs: bool
) -> Prompt:
    room = base.room(base.chat.prompt(question))
    sampling = Sampling(max_new_tokens=int(min(task.max_new_tokens, room)))
    request = Request(question, sampling, system.told([example.task]))
    options = tuple(example.options or ()) if weighs else ()
    return Prompt(request, [example], [example.id], options)
