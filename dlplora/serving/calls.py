"""What an engine is asked besides answers: calls, one after another, beside its own thread."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from dlplora.serving.errors import ApiError

T = TypeVar("T")
_WATCH_SECONDS = 0.5  # how often a client that may have gone is looked for


class Calls:
    """Runs calls of an asyncio loop in one thread, so that they take little from the answers.

    Args:
        max_open: How many calls may wait or run; more are refused.
    """

    def __init__(self, *, max_open: int) -> None:
        self._max_open = max_open
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="calls")
        self._open: set[Future[Any]] = set()
        self._stopped_for: str | None = None

    @property
    def num_open(self) -> int:
        """How many calls wait or run, also those whose client has gone."""
        return len(self._open)

    async def run(self, call: Callable[[], T], http: HttpRequest, *, seconds: float) -> T:
        """Return what a call returns, or raise what it raises.

        A call that has begun is never cut off; one that has not is dropped when its client goes.
        Raises `ApiError` if there is no room, the client goes, or it takes more than `seconds`.
        """
        future = asyncio.wrap_future(self._submit(call))
        deadline = time.monotonic() + seconds
        try:
            while not future.done():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ApiError(504, f"the reply takes more than {seconds:g} s", code="timeout")
                await asyncio.wait([future], timeout=min(left, _WATCH_SECONDS))
                if not future.done() and await http.is_disconnected():
                    raise ApiError(499, "the client has gone", code="gone")
        finally:
            future.cancel()
        if future.cancelled():
            raise self._stopped()
        return future.result()

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        if self._stopped_for is not None:
            raise self._stopped()
        if self.num_open >= self._max_open:
            raise ApiError(
                429,
                f"{self.num_open} calls wait or run, of at most {self._max_open}; try again",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        future = self._thread.submit(call)
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def _stopped(self) -> ApiError:
        return ApiError(503, str(self._stopped_for), code="unavailable")

    async def stop(self, reason: str) -> None:
        """Wait for the call that runs; those that wait end with an error."""
        self._stopped_for = reason
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
