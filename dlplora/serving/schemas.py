"""What the server's smaller paths reply."""

from openai.types import Model
from pydantic import BaseModel


class ModelRow(Model):
    """One name that requests may give as their model."""

    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(BaseModel):
    """All of them."""

    object: str = "list"
    data: list[ModelRow]


class TokensReply(BaseModel):
    """The tokens of a text."""

    tokens: list[int]
    count: int
    max_model_len: int | None


class TextReply(BaseModel):
    """The text of tokens."""

    prompt: str


class TokenizerReply(BaseModel):
    """What a client needs to render prompts by itself."""

    tokenizer_class: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None


class ChosenRoute(BaseModel):
    """Adapters with their weights, none for the base model; null where it weighs each token."""

    adapters: dict[str, float] | None
    confidence: float | None


class RoutedText(ChosenRoute):
    """The route of a text, and the probability of each task where the router has probabilities."""

    probabilities: dict[str, float] | None


class RouteReply(BaseModel):
    """The routes of texts, in their order; those of less confidence went to the base model."""

    model: str
    system_fingerprint: str
    data: list[RoutedText]
    fallback_below: float


class ScoredOption(BaseModel):
    """An option with the sum of its tokens' log-probabilities; null is none that is finite."""

    option: str
    logprob: float | None
    tokens: int
    bytes: int


class ScoreReply(BaseModel):
    """The options in their order; the best has the highest mean log-probability of a token."""

    model: str
    system_fingerprint: str
    best: str
    options: list[ScoredOption]
    route: ChosenRoute


class AdapterRow(BaseModel):
    """An adapter that a mix may name."""

    id: str


class Done(BaseModel):
    """What was done."""

    message: str


class Health(BaseModel):
    """Whether the server lives, which version serves, and which could not be loaded."""

    status: str
    version: str
    refused: str | None
