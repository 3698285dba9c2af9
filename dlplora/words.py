"""Types that the whole library shares; importing them costs nothing."""

from collections.abc import Callable
from math import isfinite
from typing import Literal

# `advance(n=1, **figures)` reports n more steps, and figures such as loss=0.31.
Advance = Callable[..., None]

# What counts as a task's score.
Primary = Literal["accuracy", "exact_match", "rougeL", "bleu"]
# How training computes: by kernels for the layers that they match, or by the model's own forward.
KernelChoice = Literal["auto", "reference"]
# When a prompt is routed: once; again when a sentence begins, and the cache is kept as the earlier
# mix made it, or all that was read and written is read again under the new mix; or once for each
# question that the prompt is split into.
Policy = Literal["route_once", "keep", "refill", "split"]
# What a question of a prompt that is split may see: itself; the questions and answers before it as
# well; or the whole prompt.
Visible = Literal["own", "own_and_answers", "all"]
# The conditions of a comparison: test items one by one (as they are, without their task's template,
# in another wording), or several questions in one prompt.
Setting = Literal["iid", "no_template", "reworded", "composite_2", "composite_3", "composite_5"]
NUM_QUESTIONS: dict[Setting, int] = {  # of a prompt
    "iid": 1,
    "no_template": 1,
    "reworded": 1,
    "composite_2": 2,
    "composite_3": 3,
    "composite_5": 5,
}


def is_whole(value: object, least: int) -> bool:
    """Tell whether a value is a whole number, at least so large and of 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
