"""One exchange with a client: its requests in the engine, and the pieces that come back."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress

from fastapi import Request as HttpRequest

from dlplora.engine.answers import Answer, Piece
from dlplora.engine.requests import Request
from dlplora.records.routes import Route
from dlplora.serving.errors import ApiError, api_error
from dlplora.serving.metrics import Metrics
from dlplora.serving.models import ServedModel

_WATCH_SECONDS = 0.5  # how often a client that may have gone is looked for


class Exchange:
    """The requests of one client, answered together.

    Answers are numbered by prompt and choice. Whoever leaves `pieces`, by an error or because the
    client has gone, cancels what is not answered yet.

    Args:
        served: The model that answers.
        requests: What is asked: a request for each prompt.
        http: The client's request, which tells whether the client is still there.
        metrics: Count what happens.
        seconds: How long the whole may take.
    """

    def __init__(
        self,
        served: ServedModel,
        requests: Sequence[Request],
        http: HttpRequest,
        metrics: Metrics,
        *,
        seconds: float,
    ) -> None:
        self.served = served
        self.requests = requests
        self.answers: dict[int, Answer] = {}
        self._http = http
        self._metrics = metrics
        self._seconds = seconds
        self._began = time.monotonic()
        self._arrived: asyncio.Queue[tuple[int, Piece | ApiError]] = asyncio.Queue()
        self._firsts: dict[int, float] = {}
        self._next_look = self._began + _WATCH_SECONDS
        try:
            served.thread.submit(requests, self._receiver)
        except ApiError:
            metrics.failed("rejected")
            raise

    def _receiver(self, place: int) -> Callable[[Piece | ApiError], None]:
        return lambda piece: self._arrived.put_nowait((place, piece))

    @property
    def num_answers(self) -> int:
        """How many answers there will be."""
        return sum(request.n for request in self.requests)

    @property
    def prompts(self) -> dict[int, Answer]:
        """One answer of each prompt."""
        return {index // self.requests[0].n: answer for index, answer in self.answers.items()}

    @property
    def routes(self) -> list[Route]:
        """The routes of all parts that were answered."""
        return [
            part.route
            for _, answer in sorted(self.answers.items())
            for part in (*answer.sentences, *answer.parts)
        ]

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece]]:
        """Yield the pieces of all answers, each with the answer's number.

        Raises `ApiError` if one cannot be answered, or if the whole takes too long.
        """
        try:
            while len(self.answers) < self.num_answers:
                place, piece = await self._next()
                error = piece if isinstance(piece, ApiError) else piece.error
                if error is not None:
                    self._metrics.failed("error")
                    raise api_error(error)
                assert isinstance(piece, Piece)
                index = place * self.requests[0].n + piece.choice
                now = time.monotonic()
                if index not in self._firsts:
                    self._firsts[index] = now
                    self._metrics.began(now - self._began)
                if piece.answer is not None:
                    self._metrics.ended(
                        piece.answer,
                        seconds=now - self._firsts[index],
                        counts_prompt=place not in self.prompts,
                    )
                    self.answers[index] = piece.answer
                yield index, piece
        except (GeneratorExit, asyncio.CancelledError):  # the client has gone
            self._metrics.failed("cancelled")
            raise
        finally:
            for request in self.requests:
                request.cancel()
            self.served.thread.wake()

    async def finish(self) -> list[Answer]:
        """Return all answers, in order; `ApiError` as `pieces`."""
        async with aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass
        return [answer for _, answer in sorted(self.answers.items())]

    async def _next(self) -> tuple[int, Piece | ApiError]:
        while True:
            await self._check_client()
            left = self._began + self._seconds - time.monotonic()
            if left <= 0:
                self._metrics.failed("timeout")
                raise ApiError(
                    504, f"the answer takes more than {self._seconds:g} s", code="timeout"
                )
            with suppress(TimeoutError):
                return await asyncio.wait_for(self._arrived.get(), min(left, _WATCH_SECONDS))

    async def _check_client(self) -> None:
        """Raise `ApiError` if the client has gone; it is looked for every now and then."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _WATCH_SECONDS
        if await self._http.is_disconnected():
            self._metrics.failed("cancelled")
            raise ApiError(499, "the client has gone", code="gone")
