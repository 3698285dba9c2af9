"""The settings of a comparison, as far as they need no model: who answers, and what counts."""

from collections.abc import Mapping

from dlplora.params.inputs import Task
from dlplora.params.project import Params
from dlplora.words import NUM_QUESTIONS, Primary, Setting


def systems_in(setting: Setting, params: Params) -> list[str]:
    """Return the systems that answer in a setting; none where it asks more than all tasks."""
    if NUM_QUESTIONS[setting] > len(params.tasks):
        return []
    return [name for name, row in params.systems.items() if setting in row.settings]


def primaries_in(setting: Setting, tasks: Mapping[str, Task]) -> dict[str, Primary]:
    """Return what counts as each task's score, by the tasks' names in order.

    Options are weighed in `iid` alone. In the other settings the generated text counts, which is
    what a person would get.
    """
    return {
        name: tasks[name].primary
        if setting == "iid" or tasks[name].primary != "accuracy"
        else "exact_match"
        for name in sorted(tasks)
    }
