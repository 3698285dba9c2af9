"""Systems built on one tiny base model as the stage `evaluate` builds them, and test items."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.evaluation.items import TaskItems
from dlplora.models import Base
from dlplora.params.inputs import Task
from dlplora.params.project import Params
from dlplora.records.examples import Example, example_id
from dlplora.systems.load import build
from dlplora.systems.system import Inputs, System
from dlplora.words import Policy
from tests.answering import TASKS

TOKENS = 8


@dataclass(frozen=True)
class Built:
    """A pipeline's folder with its params, and a loaded base model."""

    folder: Path
    params: Params
    base: Base

    def system(
        self,
        name: str,
        *,
        policy: Policy = "route_once",
        tasks: Sequence[str] = TASKS,
        seed: int = 0,
    ) -> System:
        """Build a system by its name, with a policy of its own."""
        entry = self.params.systems[name].model_copy(update={"policy": policy})
        paths = [self.folder / path for path in (entry.adapters, entry.artifact, entry.router)]
        return build(entry, Inputs(self.base, self.folder / "data/base", *paths, tasks, seed))


def items_of(*names: str, words: int = 1) -> list[TaskItems]:
    """Make five items of each task; those of colours are multiple choice."""
    tests = []
    for name in names:
        options = ("red", "blue green", "grey") if name == "colours" else None
        questions = [f"{'say ' * words}{number} {name} ?" for number in ("a", "b", "up", "c", "d")]
        task = Task(
            raw="x",
            wordings="x",
            keys="auto",
            on_bad_row="refuse",
            primary="accuracy" if options else "rougeL",
            answer_after=None,
            max_new_tokens=TOKENS,
        )
        examples = [
            Example(example_id(name, text), name, text, ("red",), options, None)
            for text in questions
        ]
        tests.append(TaskItems(examples, task))
    return tests
