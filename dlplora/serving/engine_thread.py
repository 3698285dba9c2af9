"""One thread that steps an engine for the requests of all clients."""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence

from dlplora.engine.answers import Piece
from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.serving.errors import ApiError

logger = logging.getLogger(__name__)
Receive = Callable[[Piece | ApiError], None]


class EngineThread:
    """Answers requests of an asyncio loop by an engine that a thread of its own steps.

    Args:
        engine: What answers. It is closed by its owner, once the thread has ended.
        loop: The loop that submits requests and receives their pieces.
        max_open: How many answers may wait or run; more are refused.
    """

    def __init__(self, engine: Runner, loop: asyncio.AbstractEventLoop, *, max_open: int) -> None:
        self._scheduler = engine.scheduler()
        self._loop = loop
        self._max_open = max_open
        self._receivers: dict[int, tuple[Receive, int]] = {}  # with the answers that are open
        self._work = threading.Event()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Tell whether requests are answered."""
        return self._thread.is_alive() and not self._is_stopped.is_set()

    @property
    def num_open(self) -> int:
        """How many answers wait or run."""
        return sum(count for _, count in self._receivers.values())

    @property
    def num_waiting(self) -> int:
        """How many requests wait for a place."""
        return self._scheduler.num_waiting

    def submit(self, requests: Sequence[Request], receive: Callable[[int], Receive]) -> None:
        """Queue requests, all or none; `receive(place)` takes the pieces of each.

        To be called on the loop, where pieces are received, too. Raises `ApiError` if there is no
        room, or if the thread has ended.
        """
        if not self.is_alive:
            raise ApiError(503, "the server is not answering", code="unavailable")
        wanted = sum(request.n for request in requests)
        if wanted > self._max_open:
            raise ApiError(400, f"{wanted} answers, expected at most {self._max_open} at once")
        if self.num_open + wanted > self._max_open:
            raise ApiError(
                429,
                f"{self.num_open} answers wait or run, of at most {self._max_open}; try again",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        for place, request in enumerate(requests):
            number = self._scheduler.add(request)
            self._receivers[number] = receive(place), request.n
        self._work.set()

    def wake(self) -> None:
        """Let the thread see that requests were cancelled."""
        self._work.set()

    async def stop(self, reason: str) -> None:
        """End the thread after its step; what is open then ends with an error."""
        self._is_stopped.set()
        self._work.set()
        await asyncio.to_thread(self._thread.join)
        self._fail_all(reason)

    def _run(self) -> None:
        try:
            while not self._is_stopped.is_set():
                self._work.clear()
                if self._scheduler.is_idle:
                    self._work.wait()
                    continue
                if pieces := self._scheduler.step():
                    self._loop.call_soon_threadsafe(self._deliver, pieces)
        except Exception:
            self._is_stopped.set()  # so that nothing is queued any more
            logger.exception("the engine's thread has ended")
            self._loop.call_soon_threadsafe(self._fail_all, "the engine has failed")

    def _deliver(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.number not in self._receivers:
                continue
            receive, count = self._receivers[piece.number]
            receive(piece)
            if piece.answer is not None or piece.error is not None:
                if count == 1:
                    del self._receivers[piece.number]
                else:
                    self._receivers[piece.number] = receive, count - 1

    def _fail_all(self, message: str) -> None:
        receivers, self._receivers = self._receivers, {}
        for receive, _ in receivers.values():
            receive(ApiError(503, message, code="unavailable"))
