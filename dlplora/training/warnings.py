"""PEFT without the warnings that say nothing to a user of this project."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ignore_peft_warnings() -> Iterator[None]:
    """Leave out what PEFT 0.21 warns of by itself while it changes a model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # an old name
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # it sets it rightly
        yield
