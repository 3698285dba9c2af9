"""How long an item may be: its prompt, its longest answer or option, and an end."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.data.prompts import ChatFormat
from dlplora.records.base_card import read_base_card


@dataclass(frozen=True)
class ItemLimit:
    """The most tokens that an item of one task may have, of `adapter.max_tokens` and the model.

    `context` is how many tokens the model reads; None if nothing bounds it.
    """

    chat: ChatFormat
    max_tokens: int
    context: int | None

    @classmethod
    def load(cls, base: Path, *, max_tokens: int) -> "ItemLimit":
        """Read what a base model's folder tells; `ModelError` if it cannot be used."""
        return cls(ChatFormat.load(base), max_tokens, read_base_card(base).context)

    def problem(self, question: str, answers: Sequence[str]) -> str | None:
        """Say what is wrong with an item that is too long, to follow "item 17 "; or None."""
        most = self.max_tokens if self.context is None else min(self.max_tokens, self.context)
        longest = max(len(answer.encode()) for answer in answers)
        if self.chat.num_frame + len(question.encode()) + longest < most:  # a token has a byte
            return None
        num_prompt = len(self.chat.prompt(question))
        num_answer = max(len(self.chat.answer(answer)) for answer in answers) + 1
        if num_prompt + num_answer <= most:
            return None
        reads = "" if self.context is None else f" (the model reads {self.context:,})"
        return (
            f"has {num_prompt + num_answer:,} tokens, its prompt {num_prompt:,} and its longest "
            f"answer {num_answer:,}; at most {most:,} are read: shorten it, raise "
            f"adapter.max_tokens{reads}, or leave such items out (--skip-bad-rows; on_bad_row: "
            f"skip)"
        )
