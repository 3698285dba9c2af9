"""Waiting for what another process does."""

import time
from collections.abc import Callable


def until(done: Callable[[], bool], *, within: float = 180.0) -> None:
    """Wait until it is so, for so many seconds at most."""
    end = time.monotonic() + within
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
