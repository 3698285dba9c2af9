"""From the engine's pieces and answers to what OpenAI's clients read."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.completion_choice import CompletionChoice
from openai.types.completion_choice import Logprobs as OpenAiLogprobs
from pydantic import BaseModel, ConfigDict

from dlplora.engine.answers import Answer, Ending, Passage
from dlplora.engine.logprobs import TokenScore
from dlplora.records.routes import Route

_MOST_SHOWN = 8  # in a header
_FINISH: dict[Ending, str] = {
    "end": "stop",
    "stop": "stop",
    "length": "length",
    "cancelled": "stop",
}


class RoutedPart(BaseModel):
    """A sentence, or the answer to one question of several, with the adapters that wrote it."""

    text: str
    adapters: dict[str, float] | None
    confidence: float | None
    question: str | None = None


class RoutedChat(ChatCompletion):
    """OpenAI's chat completion, and the route of each choice's parts."""

    model_config = ConfigDict(extra="forbid")
    route: list[list[RoutedPart]]


class Logprobs(OpenAiLogprobs):
    """Those of a completion; nothing predicts a prompt's first token."""

    token_logprobs: list[float | None] | None = None  # type: ignore[assignment]
    top_logprobs: list[dict[str, float] | None] | None = None  # type: ignore[assignment]


class RoutedChoice(CompletionChoice):
    """One answer of a completion."""

    logprobs: Logprobs | None = None


class RoutedCompletion(Completion):
    """OpenAI's completion, and the route of each choice's parts."""

    model_config = ConfigDict(extra="forbid")
    choices: list[RoutedChoice]  # type: ignore[assignment]
    route: list[list[RoutedPart]]


def finish_reason(answer: Answer) -> str:
    """Return OpenAI's word for how an answer ended."""
    return _FINISH[answer.ending]


def weights_of(route: Route) -> dict[str, float] | None:
    """Return the weight of each adapter of a route; None where the model weighs them itself."""
    return None if route.per_token else dict(route.mix)


def route_of(answer: Answer) -> list[dict[str, Any]]:
    """Tell by which adapters each part of an answer was written."""
    is_split = answer.parts[0].question is not None
    told: Sequence[Passage] = answer.parts if is_split else answer.sentences or answer.parts
    return [
        {
            "text": part.text,
            "adapters": weights_of(part.route),
            "confidence": part.route.confidence,
            "question": getattr(part, "question", None),
        }
        for part in told
    ]


def route_headers(routes: Sequence[Route]) -> dict[str, str]:
    """Tell the mixes of routes, each once and the first few, and the least confidence."""
    named = {"per-token" if route.per_token else _mix(route) or "base": None for route in routes}
    headers = {"x-dlplora-adapters": _first_few(";", list(named))}
    sure = [route.confidence for route in routes if route.confidence is not None]
    if sure:
        headers["x-dlplora-confidence"] = f"{min(sure):.4f}"
    return headers


def _mix(route: Route) -> str:
    return _first_few(",", [f"{quote(name)}={weight:.4g}" for name, weight in route.mix])


def _first_few(between: str, texts: Sequence[str]) -> str:
    rest = ["..."] if len(texts) > _MOST_SHOWN else []
    return between.join([*texts[:_MOST_SHOWN], *rest])


def chat_logprobs(tokens: Sequence[TokenScore]) -> dict[str, Any]:
    """Return the logprobs of a chat's tokens."""
    return {
        "content": [
            {
                **_token(score.text, score.logprob),
                "top_logprobs": [_token(one.text, one.logprob) for one in score.top],
            }
            for score in tokens
        ]
    }


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def completion_logprobs(tokens: Sequence[TokenScore], *, start: int) -> dict[str, Any]:
    """Return the logprobs of a completion's tokens, whose text begins at an offset.

    A token stands among the likeliest at its position, whether it is one or not.
    """
    offsets = []
    for score in tokens:
        offsets.append(start)
        start += len(score.text)
    return {
        "tokens": [score.text for score in tokens],
        "token_logprobs": [score.logprob for score in tokens],
        "top_logprobs": [_top(score) for score in tokens],
        "text_offset": offsets,
    }


def _top(score: TokenScore) -> dict[str, float] | None:
    if score.logprob is None:
        return None
    found: dict[str, float] = {}
    for one in score.top:  # two tokens may look alike
        found.setdefault(one.text, one.logprob)
    found.setdefault(score.text, score.logprob)
    return found


def usage(prompts: Mapping[int, Answer], answers: Sequence[Answer]) -> dict[str, Any]:
    """Count tokens: `prompts` holds one answer of each prompt."""
    num_prompt = sum(answer.num_prompt_tokens for answer in prompts.values())
    num_answer = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {
            "cached_tokens": sum(answer.num_cached_tokens for answer in prompts.values())
        },
    }
