"""What the engine gives back."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from dlplora.engine.logprobs import TokenScore
from dlplora.errors import DlpLoraError
from dlplora.records.routes import BASE_ROUTE, Route

Ending = Literal["end", "length", "stop", "cancelled"]


@dataclass(frozen=True)
class Passage:
    """A stretch of an answer and the route that it was written by."""

    text: str
    route: Route


@dataclass(frozen=True)
class Part(Passage):
    """The answer to one question; of a prompt that was split, to which, and how it ended."""

    question: str | None = None
    ending: Ending | None = None


@dataclass(frozen=True)
class Answer:
    """A finished answer with its trace: what was written by which route.

    `parts` are the answers to a multi-question prompt, one after another, each with its last route.
    `num_prompt_tokens` is the prompt's length, of which `num_cached_tokens` were found in the
    prefix cache. `tokens` and `prompt_tokens` are scored if the request asks for it.
    """

    text: str
    parts: tuple[Part, ...]
    sentences: tuple[Passage, ...]
    ending: Ending
    num_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int = field(default=0, compare=False)
    tokens: tuple[TokenScore, ...] = ()
    prompt_tokens: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What became certain last for the request of a number, and the route that is in force.

    `choice` tells the answers of a request of several apart: each has a last piece of its own, with
    the answer or the error that ended it. `tokens` are the scored tokens that were written since
    the piece before.
    """

    number: int
    text: str
    route: Route
    answer: Answer | None = None
    error: DlpLoraError | None = None
    choice: int = 0
    tokens: tuple[TokenScore, ...] = ()


def cancelled_piece(number: int, choice: int) -> Piece:
    """Return the only piece of a request that was cancelled before its prompt was read."""
    empty = (Part("", BASE_ROUTE),)
    answer = Answer("", empty, (), "cancelled", num_tokens=0, num_prompt_tokens=0)
    return Piece(number, "", BASE_ROUTE, answer, choice=choice)


def raising(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield pieces; raise the first error that ends a request."""
    for piece in pieces:
        if piece.error is not None:
            raise piece.error
        yield piece
