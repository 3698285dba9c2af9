"""What is asked of the engine and what it gives back."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Literal, get_args

from dlplora.errors import DlpLoraError, GenerationError, choices
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.sampling import Sampling
from dlplora.words import Policy

Ending = Literal["end", "length", "stop", "cancelled"]


def check_text(text: object) -> None:
    """Raise `GenerationError` unless this is a text that a tokenizer can read."""
    if not isinstance(text, str):
        raise GenerationError(f"a prompt is {type(text).__name__}, expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"a prompt's character {error.start + 1} is {text[error.start]!a}, half of a character"
        ) from error


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be answered.

    Without `routes` the router chooses, and without `policy` the runner's holds. A multi-question
    prompt asks for `num_answers`: when the model ends one before the last, a line break is appended
    and, unless the policy is `route_once`, it is routed again. Several `routes` are those of the
    answers, one after another.
    """

    prompt: str
    sampling: Sampling = field(default_factory=Sampling)
    routes: tuple[Route, ...] = ()
    policy: Policy | None = None
    num_answers: int = 1
    cancelled: Event = field(init=False, default_factory=Event, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be answered."""
        check_text(self.prompt)
        if self.num_answers < 1:
            raise GenerationError(f"num_answers is {self.num_answers}, expected at least 1")
        if self.policy not in (None, *get_args(Policy)):
            raise GenerationError(
                f"policy is {self.policy!r}, expected one of {choices(get_args(Policy))}"
            )

    def cancel(self) -> None:
        """Let go of the request; what was written so far is its answer."""
        self.cancelled.set()


@dataclass(frozen=True)
class Passage:
    """A stretch of an answer and the route that it was written by."""

    text: str
    route: Route


@dataclass(frozen=True)
class Answer:
    """A finished answer with its trace: what was written by which route.

    `parts` are the answers to a composite prompt, one after another, each with its last route.
    """

    text: str
    parts: tuple[Passage, ...]
    sentences: tuple[Passage, ...]
    ending: Ending
    num_tokens: int


@dataclass(frozen=True)
class Piece:
    """What became certain last for the request of a number, and the route that is in force.

    With the last piece comes the answer, or the error that ended the request.
    """

    number: int
    text: str
    route: Route
    answer: Answer | None = None
    error: DlpLoraError | None = None


def cancelled_before(number: int) -> Piece:
    """Return the only piece of a request that was cancelled before it was read."""
    nothing = (Passage("", BASE_ROUTE),)
    return Piece(number, "", BASE_ROUTE, Answer("", nothing, (), "cancelled", 0))


def raising(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield pieces; raise the first error that ends a request."""
    for piece in pieces:
        if piece.error is not None:
            raise piece.error
        yield piece
