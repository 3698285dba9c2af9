"""The test items of tasks, and how an answer to one is scored."""

from collections.abc import Sequence
from dataclasses import dataclass

from dlplora.engine.requests import Request
from dlplora.evaluation.metrics import METRICS
from dlplora.params.inputs import Task
from dlplora.records.examples import Example
from dlplora.records.routes import Route
from dlplora.records.scores import ItemScore, OptionScores
from dlplora.words import Primary


@dataclass(frozen=True)
class TaskItems:
    """The test examples of one task, and how its answers are scored."""

    examples: Sequence[Example]
    task: Task

    @property
    def name(self) -> str:
        """The task's name."""
        return self.examples[0].task


@dataclass(frozen=True)
class Prompt:
    """One prompt of a setting: how it is asked, and the items that its answers are scored as.

    `options` are those of a multiple-choice question that is asked alone; else there are none.
    """

    request: Request
    examples: Sequence[Example]
    item_ids: Sequence[str]
    options: tuple[str, ...] = ()


def score_answer(
    example: Example,
    text: str,
    route: Route,
    *,
    task: Task,
    primary: Primary,
    item_id: str,
    prompt: str,
    options: OptionScores | None = None,
) -> ItemScore:
    """Score the generated text of one example or, where options were weighed, the best of them."""
    prediction = text if options is None else options.best
    scored = prediction if primary == "accuracy" else text
    return ItemScore(
        id=item_id,
        task=example.task,
        prompt=prompt,
        prediction=prediction,
        references=example.answers,
        score=METRICS[primary].of_item(scored, example.answers, task.answer_after),
        generated=text,
        options=options,
        route=route,
        answer_after=task.answer_after,
    )
