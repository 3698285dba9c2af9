"""The settings of a comparison beside `iid`, as far as they need no model."""

from collections.abc import Mapping

from dlplora.params import Task
from dlplora.words import Policy, Primary

ORACLE = "oracle"
# Systems of composite prompts: what happens when an answer ends. The oracle is told each task.
POLICIES: dict[str, Policy] = {
    ORACLE: "refill",
    "route_once": "route_once",
    "keep": "keep",
    "refill": "refill",
}


def composite_primaries(tasks: Mapping[str, Task]) -> dict[str, Primary]:
    """Return each task's metric of generated text: options are not weighed within an answer."""
    return {
        name: "exact_match" if tasks[name].primary == "accuracy" else tasks[name].primary
        for name in sorted(tasks)
    }
