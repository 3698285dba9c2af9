"""Prompts and answers as token ids, by the tokenizer's own chat template and end token."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from dlplora.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\u27e6question\u27e7"


@dataclass(frozen=True)
class Prompt:
    """The token ids of a rendered question and how many of them were cut to fit."""

    ids: tuple[int, ...]
    num_cut: int


class ChatFormat:
    """How one base model is asked and how it ends its answers.

    A tokenizer without a chat template is given the question alone. `system` is the explicit
    system turn; it may be empty, as a template's own default would cost tokens in each prompt,
    or None for templates that know no such turn.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", system: str | None) -> None:
        self.tokenizer = tokenizer
        self.system = system

    @cached_property
    def end_id(self) -> int:
        """The token that ends an answer."""
        end: int | None = self.tokenizer.eos_token_id
        if end is None:
            raise ModelError("the tokenizer has no end-of-sequence token; set eos_token in it")
        return end

    @cached_property
    def pad_id(self) -> int:
        """The token that fills up batches; its value never matters."""
        pad: int | None = self.tokenizer.pad_token_id
        return self.end_id if pad is None else pad

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """The text before and after the question."""
        if self.tokenizer.chat_template is None:
            return "", ""
        before, mark, after = self._render(_MARK).partition(_MARK)
        if not mark or _MARK in after:
            raise ModelError("the chat template does not show the user's message exactly once")
        return before, after

    def _render(self, question: str) -> str:
        turns = [{"role": "user", "content": question}]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=False
                )
            )
        except TemplateError as error:
            raise ModelError(
                f"the chat template refuses its turns: {error}; without a system turn "
                f"(base_model.system_prompt: null) it may not"
            ) from error

    def prompt(self, question: str, *, max_tokens: int) -> Prompt:
        """Render a question; if it is too long, cut its beginning but not the template."""
        before, after = self._frame
        text = before + question + after
        encoded = self.tokenizer(
            text, add_special_tokens=not before, return_offsets_mapping=True, truncation=False
        )
        ids: list[int] = encoded["input_ids"]
        if len(ids) <= max_tokens:
            return Prompt(tuple(ids), 0)
        first, last = len(before), len(before) + len(question)
        inside = [
            place
            for place, (start, end) in enumerate(encoded["offset_mapping"])
            if start >= first and end <= last and end > start
        ]
        num_cut = len(ids) - max_tokens
        if num_cut >= len(inside):
            raise ModelError(
                f"a prompt of {len(ids)} tokens cannot be cut to {max_tokens}: "
                f"{len(ids) - len(inside)} of them are the chat template"
            )
        return Prompt(tuple(ids[: inside[0]] + ids[inside[num_cut] :]), num_cut)

    def answer(self, text: str) -> tuple[int, ...]:
        """Tokenise an answer or option, without its end."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tuple(ids)

    def decode(self, ids: list[int]) -> str:
        """Turn tokens into text, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def text(self, ids: list[int]) -> str:
        """Turn the tokens of an answer into text, without white space around it."""
        return self.decode(ids).strip()
