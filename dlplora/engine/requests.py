"""What the engine is asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any, Literal, get_args

from dlplora.engine.logprobs import MAX_ALTERNATIVES
from dlplora.errors import GenerationError, choices
from dlplora.records.routes import Route
from dlplora.sampling import Sampling
from dlplora.words import Policy, Visible, is_number, is_whole

Role = Literal["system", "user", "assistant"]
# What a router reads of a chat: the last turn, the end of all turns, or whichever it is surer of.
RouteOn = Literal["last_turn", "window", "surest"]


def check_text(text: object, what: str = "a prompt") -> None:
    """Raise `GenerationError` unless this is a text that a tokenizer can read."""
    if not isinstance(text, str):
        raise GenerationError(f"{what} is {type(text).__name__}, expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"{what}'s character {error.start + 1} is {text[error.start]!a}, half of a character"
        ) from error


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        """Refuse what no template knows."""
        if self.role not in get_args(Role):
            raise GenerationError(
                f"a message's role is {self.role!r}, expected one of {choices(get_args(Role))}"
            )
        check_text(self.content, "a message")


Chat = tuple[Message, ...]
TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One prompt and how it is to be answered.

    Without `routes` the router of the request's system chooses, and without `policy` that system's
    holds. By the policy `split` a prompt of several questions is cut, and each is answered as a
    request of its own; the answers come back in order. By others a multi-question prompt asks for
    `num_answers`: when the model ends one before the last, a line break is appended and, unless the
    policy is `route_once`, it is routed again. Several `routes` are those of the answers, one after
    another.

    Args:
        prompt: A question; a chat, whose last turn is the user's; or token ids, which are taken as
            they are.
        sampling: How tokens are chosen, and where the answer ends.
        routes: The adapters to answer by; their weights may be any finite numbers.
        policy: When the request is routed again.
        num_answers: How many questions the prompt holds.
        system: The system that answers, by a name that the engine was loaded with.
        fallback_below: The confidence below which the base model answers instead, if not that of
            the system.
        raw: Take a prompt's text as it is, without the chat template.
        truncate: Leave out the first tokens of a prompt that is too long, instead of refusing it.
        route_on: What the router reads of a chat: the last user turn, the last `window_chars` of
            all turns, or both, of which the route of more confidence counts: a follow-up may lean
            on the turns before it or ask something new.
        visible: What a question of a prompt that is split may see.
        max_total_tokens: The tokens of all answers to a prompt that is split: each question gets an
            equal share, at most `max_new_tokens`.
        n: How many answers are drawn; the seed of each is one more than that of the one before.
        logprobs: Score the answer's tokens, each with so many of the likeliest alternatives.
        echo: Score the prompt's tokens as well.
    """

    prompt: str | Chat | TokenIds
    sampling: Sampling = field(default_factory=Sampling)
    routes: tuple[Route, ...] = ()
    policy: Policy | None = None
    num_answers: int = 1
    system: str | None = None
    fallback_below: float | None = None
    raw: bool = False
    truncate: bool = False
    route_on: RouteOn = "surest"
    visible: Visible = "own"
    max_total_tokens: int | None = None
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    cancelled: Event = field(init=False, default_factory=Event, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be answered."""
        _check_prompt(self.prompt)
        for name in ("num_answers", "n"):
            if not is_whole(getattr(self, name), 1):
                raise GenerationError(
                    f"{name} is {getattr(self, name)!r}, expected a whole number, at least 1"
                )
        for name, allowed in (
            ("policy", get_args(Policy)),
            ("route_on", get_args(RouteOn)),
            ("visible", get_args(Visible)),
        ):
            value = getattr(self, name)
            if value not in allowed and not (name == "policy" and value is None):
                raise GenerationError(f"{name} is {value!r}, expected one of {choices(allowed)}")
        for name, kind, expected in (
            ("sampling", Sampling, "a Sampling"),
            ("routes", tuple, "a tuple of routes"),
            ("system", str | None, "a name or none"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise GenerationError(f"{name} is {getattr(self, name)!r}, expected {expected}")
        if not all(isinstance(route, Route) for route in self.routes):
            raise GenerationError(f"routes is {self.routes!r}, expected a tuple of routes")
        if self.max_total_tokens is not None and not is_whole(self.max_total_tokens, 1):
            raise GenerationError(
                f"max_total_tokens is {self.max_total_tokens!r}, expected none or a whole number, "
                f"at least 1"
            )
        least = self.fallback_below
        if least is not None and not (is_number(least) and 0 <= least <= 1):
            raise GenerationError(f"fallback_below is {least!r}, expected none or 0 to 1")
        if self.logprobs is not None and not (
            is_whole(self.logprobs, 0) and self.logprobs <= MAX_ALTERNATIVES
        ):
            raise GenerationError(
                f"logprobs is {self.logprobs!r}, expected none or 0 to {MAX_ALTERNATIVES}"
            )
        if self.echo and self.logprobs is None:
            raise GenerationError("echo scores the prompt's tokens: logprobs says how many of each")
        for name in ("raw", "truncate", "echo"):
            if not isinstance(getattr(self, name), bool):
                raise GenerationError(f"{name} is {getattr(self, name)!r}, expected true or false")
        if self.raw and not isinstance(self.prompt, str):
            raise GenerationError("raw takes a text as it is; found a chat or token ids")

    @property
    def has_template(self) -> bool:
        """Tell whether the prompt is put into the base model's chat template."""
        is_chat = isinstance(self.prompt, tuple) and isinstance(self.prompt[0], Message)
        return is_chat or (isinstance(self.prompt, str) and not self.raw)

    @property
    def last_turn(self) -> str | None:
        """The text that is asked last; None of token ids and raw text, which have no turns."""
        if self.raw:
            return None
        if isinstance(self.prompt, str):
            return self.prompt
        last = self.prompt[-1]
        return None if isinstance(last, int) else last.content

    def changed(self, **changes: Any) -> "Request":
        """Return the same request with other values; what cancels one cancels both."""
        found = replace(self, **changes)
        object.__setattr__(found, "cancelled", self.cancelled)
        return found

    def cancel(self) -> None:
        """Let go of the request; what was written so far is its answer."""
        self.cancelled.set()


def _check_prompt(prompt: object) -> None:
    if prompt == ():
        raise GenerationError("the prompt is empty, expected a text, a chat or token ids")
    if isinstance(prompt, tuple):
        if all(isinstance(turn, Message) for turn in prompt):
            if prompt[-1].role != "user":
                raise GenerationError(
                    f"the last message is by the {prompt[-1].role}, expected the user's"
                )
            return
        if all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            if min(prompt) < 0:
                raise GenerationError(f"the prompt has the token {min(prompt)}, expected 0 or more")
            return
    if isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes):
        raise GenerationError("a prompt is no text; expected a tuple of messages or of token ids")
    check_text(prompt)
