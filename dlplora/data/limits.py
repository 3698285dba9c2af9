"""How long an item may be: its prompt, its longest answer or option, and an end."""

from collections.abc import Sequence
from pathlib import Path

from dlplora.data.prompts import ChatFormat
from dlplora.records.base_card import read_base_card


class ItemLimit:
    """The most tokens that an item may have: `adapter.max_tokens`, or less if the model reads less.

    `context` is how many tokens the model reads; None if nothing bounds it.
    """

    def __init__(self, chat: ChatFormat, max_tokens: int, context: int | None) -> None:
        self.chat = chat
        self._advice = "shorten it"
        if context is None or max_tokens < context:
            reads = "" if context is None else f" (the model reads {context:,})"
            self._advice += f", raise adapter.max_tokens{reads}"
        self._most = max_tokens if context is None else min(max_tokens, context)
        self._room = self._most - len(chat.prompt("")) - 2  # tokens of a question and answer

    @classmethod
    def load(cls, base: Path, *, max_tokens: int) -> "ItemLimit":
        """Read what a base model's folder tells; `ModelError` if it cannot be used."""
        return cls(ChatFormat.load(base), max_tokens, read_base_card(base).context)

    def is_harmless(self, text: str) -> bool:
        """Tell at a glance that an item of this text is short and holds no control token."""
        most_bytes = len(text) if text.isascii() else 4 * len(text)  # a token has one at least
        return most_bytes < self._room and not self.chat.may_hold_controls(text)

    def problem(self, question: str, answers: Sequence[str]) -> str | None:
        """Say what is wrong with an item that is too long, to follow "item 17 "; or None."""
        num_prompt = len(self.chat.prompt(question))
        num_answer = max(len(self.chat.answer(answer)) for answer in answers) + 1
        if num_prompt + num_answer <= self._most:
            return None
        return (
            f"has {num_prompt + num_answer:,} tokens, its prompt {num_prompt:,} and its longest "
            f"answer {num_answer:,}; at most {self._most:,} are read: {self._advice}, or leave "
            f"such items out (--skip-bad-rows; on_bad_row: skip)"
        )
