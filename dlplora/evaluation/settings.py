"""The settings of a comparison, as far as they need no model: who answers, and what counts."""

from collections.abc import Mapping

from dlplora.params.inputs import Task
from dlplora.params.project import Params
from dlplora.words import Primary, Setting

NUM_QUESTIONS: dict[Setting, int] = {"iid": 1, "composite_2": 2, "composite_3": 3}  # of a prompt


def systems_in(setting: Setting, params: Params) -> list[str]:
    """Return the systems that answer in a setting; none where it asks more than all tasks."""
    if NUM_QUESTIONS[setting] > len(params.tasks):
        return []
    return [name for name, row in params.systems.items() if setting in row.settings]


def primaries_in(setting: Setting, tasks: Mapping[str, Task]) -> dict[str, Primary]:
    """Return what counts as each task's score, by the tasks' names in order.

    In a prompt of several questions no options are weighed: the generated text counts.
    """
    alone = NUM_QUESTIONS[setting] == 1
    return {
        name: tasks[name].primary if alone or tasks[name].primary != "accuracy" else "exact_match"
        for name in sorted(tasks)
    }
