"""An exchange told as a stream of OpenAI's events."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi.responses import StreamingResponse

from dlplora.engine.answers import Piece
from dlplora.serving import replies
from dlplora.serving.errors import ApiError, log_failure
from dlplora.serving.exchange import Exchange
from dlplora.serving.shapes import Shape

# What some clients take for the end of a line: JSON may hold it as it is or escaped.
_LINE_ENDS = {"\x85": b"\\u0085", "\u2028": b"\\u2028", "\u2029": b"\\u2029"}


async def stream(
    exchange: Exchange, shape: Shape, head: dict[str, Any], *, has_usage: bool, request_id: str
) -> StreamingResponse:
    """Return a stream; it begins with the first text, so that what fails before has its status.

    `head` is what all events have in common. Raises `ApiError` if nothing can be answered.
    """
    pieces = exchange.pieces()
    first = await anext(pieces)
    head |= {"object": shape.chunk_object} | ({"usage": None} if has_usage else {})

    async def events() -> AsyncIterator[bytes]:
        opened: set[int] = set()
        async with aclosing(pieces):
            try:
                async for index, piece in _chained(first, pieces):
                    if index not in opened:
                        opened.add(index)
                        if (opening := shape.opening(index)) is not None:
                            yield _event({**head, "choices": [opening]})
                    if piece.text or piece.tokens:
                        yield _event({**head, "choices": [shape.piece(index, piece)]})
                    if piece.answer is not None:
                        closing = shape.closing(index, piece.answer)
                        route = replies.route_of(piece.answer)
                        yield _event({**head, "choices": [closing], "route": route})
            except ApiError as error:
                log_failure(error, request_id)
                yield _event(error.told())
                return
        if has_usage:
            answers = [answer for _, answer in sorted(exchange.answers.items())]
            told = replies.usage(exchange.prompts, answers)
            yield _event({**head, "choices": [], "usage": told})
        yield b"data: [DONE]\n\n"

    return StreamingResponse(
        events(),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", **replies.route_headers([first[1].route])},
    )


async def _chained(
    first: tuple[int, Piece], others: AsyncIterator[tuple[int, Piece]]
) -> AsyncIterator[tuple[int, Piece]]:
    yield first
    async for one in others:
        yield one


def _event(told: dict[str, Any]) -> bytes:
    text = orjson.dumps(told)
    for end, escaped in _LINE_ENDS.items():
        text = text.replace(end.encode(), escaped)
    return b"data: " + text + b"\n\n"
