"""Names that params, records and the command line share; importing them costs nothing."""

from collections.abc import Callable
from typing import Literal

# What counts as a task's score.
Primary = Literal["accuracy", "exact_match", "rougeL", "bleu"]
# What happens when a sentence begins: nothing; the router is asked again and the cache is kept as
# the earlier mix made it; or all that was read and written is read again under the new mix.
Policy = Literal["route_once", "keep", "refill"]
# The conditions of a comparison: test items one by one, or several questions in one prompt.
Setting = Literal["iid", "composite_2", "composite_3"]
# Tells how far something is: `advance(n=1, **figures)`.
Advance = Callable[..., None]
