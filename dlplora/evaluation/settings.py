"""What differs between settings, as far as it needs no model."""

from collections.abc import Mapping

from dlplora.params.inputs import Task
from dlplora.params.systems import NUM_QUESTIONS
from dlplora.words import Primary, Setting


def primaries_in(setting: Setting, tasks: Mapping[str, Task]) -> dict[str, Primary]:
    """Return what counts as each task's score, by the tasks' names in order.

    In a prompt of several questions no options are weighed: the generated text counts.
    """
    alone = NUM_QUESTIONS[setting] == 1
    return {
        name: tasks[name].primary if alone or tasks[name].primary != "accuracy" else "exact_match"
        for name in sorted(tasks)
    }
