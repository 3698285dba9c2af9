"""What is asked of the engine and what it gives back."""

from dataclasses import dataclass, field
from threading import Event
from typing import Literal

from dlplora.records.routes import Route
from dlplora.sampling import Sampling
from dlplora.words import Policy

Ending = Literal["end", "length", "stop", "cancelled"]


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be answered.

    Without `routes` the router chooses. With them, they are the routes of the answers, one after
    another. A composite prompt asks for `num_answers`: when the model ends one before the last,
    a line break is appended and it is routed again.
    """

    prompt: str
    sampling: Sampling = field(default_factory=Sampling)
    routes: tuple[Route, ...] = ()
    policy: Policy = "route_once"
    num_answers: int = 1
    cancelled: Event = field(default_factory=Event, compare=False, repr=False)

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
    `num_cut` tokens of the prompt's beginning were left out, as it was too long.
    """

    text: str
    parts: tuple[Passage, ...]
    sentences: tuple[Passage, ...]
    ending: Ending
    num_tokens: int
    num_cut: int = 0


@dataclass(frozen=True)
class Piece:
    """What was written last for the request of a number; with the last piece comes the answer."""

    number: int
    text: str
    route: Route
    answer: Answer | None = None
