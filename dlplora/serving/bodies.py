"""What clients send: the bodies of requests as OpenAI's API has them, and what is ours in them."""

import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from dlplora.engine.requests import Message, Request
from dlplora.records.routes import Route
from dlplora.sampling import Sampling
from dlplora.words import Policy, Visible


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is empty")
    return text


def _all_different(texts: list[str]) -> list[str]:
    if len(set(texts)) < len(texts):
        raise ValueError("found an option twice, expected all different")
    return texts


Text = Annotated[str, Field(max_length=2_000_000)]
Question = Annotated[Text, Field(min_length=1), AfterValidator(_not_blank)]
Option = Annotated[str, Field(min_length=1, max_length=2000)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Threshold = Annotated[float, Field(ge=0, le=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# A list is refused by its first mistake.
Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
_MOST_FIELDS = 100
_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


class Body(BaseModel):
    """A body that is refused if it holds what is not known; null stands for an absent value."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if len(values) > _MOST_FIELDS:
            raise ValueError(f"has {len(values)} fields, expected at most {_MOST_FIELDS}")
        return {key: value for key, value in values.items() if value is not None}


class MixPart(Body):
    """An adapter and its weight, in a mix that the client chooses."""

    id: str
    scale: Annotated[float, Field(ge=-1000, le=1000)]


class StreamOptions(Body):
    """What a stream tells besides the text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # not used


class ResponseFormat(Body):
    """The format of answers: text alone."""

    type: Literal["text"]


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn of a chat."""

    role: Literal["developer", "system", "user", "assistant"]
    content: Text | list[TextPart]
    name: str = ""  # not used

    def message(self) -> Message:
        """Return the engine's message."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message(_ROLES[self.role], text)


class Mixed(Body):
    """A model, or in its place a mix of adapters without a router (`lora`)."""

    model: str = ""
    lora: Annotated[list[MixPart], Field(min_length=1, max_length=64)] | None = None
    fallback_below: Threshold | None = None

    @property
    def route(self) -> Route | None:
        """The mix that the client chose; `RouterError` on one that is none."""
        if self.lora is None:
            return None
        return Route(tuple(part.id for part in self.lora), tuple(p.scale for p in self.lora))


class Asked(Mixed):
    """What chats and completions have in common; `user`, `metadata` and `store` are not used."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.001, le=1000)] = 1.0
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    route_policy: Policy | None = None
    visible: Visible = "own"
    user: str = ""
    metadata: dict[str, Any] | None = None
    store: bool = False

    def sampling(self, max_new_tokens: int) -> Sampling:
        """Return how tokens are chosen; `GenerationError` on what cannot be."""
        seed = secrets.randbits(62) if self.seed is None else self.seed % 2**63
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )


class ChatBody(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    num_prompts: ClassVar[int] = 1

    @property
    def max_new_tokens(self) -> int | None:
        """How long the answer may be, if the client says so."""
        return self.max_completion_tokens or self.max_tokens

    def requests(self, max_new_tokens: int, **told: Any) -> list[Request]:
        """Return the one request; `told` are the fields that depend on the model."""
        messages = tuple(message.message() for message in self.messages)
        is_question = len(messages) == 1 and messages[0].role == "user"
        return [
            Request(
                messages[0].content if is_question else messages,
                self.sampling(max_new_tokens),
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
                n=self.n,
                **told,
            )
        ]


class CompletionBody(Asked):
    """The body of /v1/completions: prompts without a chat template."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=256, fail_fast=True)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=256, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False

    @model_validator(mode="after")
    def _is_whole(self) -> "CompletionBody":
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is known at the end alone; leave out stream")
        return self

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return len(self.prompts())

    @property
    def max_new_tokens(self) -> int:
        """How long each answer may be."""
        return self.max_tokens

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Return each prompt, a text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [tuple(token for token in self.prompt if isinstance(token, int))]
        return [one if isinstance(one, str) else tuple(one) for one in self.prompt]

    def requests(self, max_new_tokens: int, **told: Any) -> list[Request]:
        """Return a request for each prompt; `told` are the fields that depend on the model."""
        return [
            Request(
                prompt,
                self.sampling(max_new_tokens),
                raw=isinstance(prompt, str),
                logprobs=self.logprobs,
                echo=self.echo and self.logprobs is not None,
                n=self.n,
                **told,
            )
            for prompt in self.prompts()
        ]


class RouteBody(Body):
    """The body of /v1/route."""

    model: str = ""
    texts: Annotated[list[Question], Field(min_length=1, max_length=256, fail_fast=True)]
    fallback_below: Threshold | None = None


class ScoreBody(Mixed):
    """The body of /v1/score."""

    prompt: Question
    options: Annotated[
        list[Option],
        Field(
            min_length=2, max_length=256, fail_fast=True, json_schema_extra={"uniqueItems": True}
        ),
        AfterValidator(_all_different),
    ]


class TokenizeBody(Body):
    """The body of /tokenize; control tokens in the text are read as the tokenizer reads them."""

    model: str = ""
    prompt: Text
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """The body of /detokenize."""

    model: str = ""
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000, fail_fast=True)]


# A name never becomes a path.
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class LoadBody(Body):
    """The body of /v1/load_lora_adapter."""

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadBody(Body):
    """The body of /v1/unload_lora_adapter."""

    lora_name: AdapterName
