"""The two shapes of OpenAI's replies: chat completions and completions, whole or as a stream."""

from collections.abc import Sequence
from typing import Any, Protocol

from dlplora.engine.answers import Answer, Piece
from dlplora.engine.logprobs import TokenScore
from dlplora.serving import replies


class Shape(Protocol):
    """How the answers to one body are told, choice by choice."""

    prefix: str  # of the reply's id
    whole_object: str
    chunk_object: str

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return a choice of a reply that is no stream."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return what a stream tells before a choice's first text; None if that is nothing."""

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a choice that continues."""

    def closing(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return a choice that has ended; its text was told before."""


class ChatShape:
    """Messages, and deltas of them."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *, has_logprobs: bool) -> None:
        self._has_logprobs = has_logprobs

    def _logprobs(self, tokens: Sequence[TokenScore]) -> dict[str, Any] | None:
        return replies.chat_logprobs(tokens) if self._has_logprobs else None

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return a choice with its message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": replies.finish_reason(answer),
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the delta that names the role."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a delta of the content."""
        return {
            "index": index,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs(piece.tokens),
            "finish_reason": None,
        }

    def closing(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return an empty delta and the reason of the end."""
        reason = replies.finish_reason(answer)
        return {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}


class CompletionShape:
    """Texts behind prompts, of which each has `n`; `echoed` are the prompts', if they are told."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *, has_logprobs: bool, echoed: Sequence[str], n: int) -> None:
        self._has_logprobs = has_logprobs
        self._echoed = echoed
        self._n = n
        self._told: dict[int, int] = {}  # how many characters of each choice's tokens

    def _echo(self, index: int) -> str:
        return self._echoed[index // self._n] if self._echoed else ""

    def whole(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return a choice with its text."""
        tokens = (*answer.prompt_tokens, *answer.tokens)
        return {
            "index": index,
            "text": self._echo(index) + answer.text,
            "logprobs": self._logprobs(index, tokens),
            "finish_reason": replies.finish_reason(answer),
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the prompt, if it is echoed."""
        if not self._echo(index):
            return None
        return self._chunk(index, self._echo(index), None)

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a choice that continues."""
        return self._chunk(index, piece.text, self._logprobs(index, piece.tokens))

    def closing(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return a choice without text."""
        return self._chunk(index, "", None, replies.finish_reason(answer))

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, index: int, tokens: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._has_logprobs:
            return None
        start = self._told.get(index, 0)
        self._told[index] = start + sum(len(score.text) for score in tokens)
        return replies.completion_logprobs(tokens, start=start)
