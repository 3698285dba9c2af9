"""Prompts and answers as token ids: plain text within the base model's own template."""

import datetime
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from dlplora.errors import ModelError, one_line
from dlplora.records.base_card import Frame, read_base_card
from dlplora.replaced import replaced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\u27e6question\u27e7"


class _StoppedClock:
    """What templates that tell the date are told."""

    @staticmethod
    def now() -> datetime.datetime:
        """Return the same moment always."""
        return datetime.datetime(2024, 7, 26)


class ChatFormat:
    """How one base model is asked and how it ends its answers.

    Questions, answers and options are plain text: what looks like a control token in them is
    encoded as the characters that it is made of.
    """

    def __init__(self, tokenizer: Tokenizer, frame: Frame) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.frame = frame
        self._controls = frozenset(frame.control_ids)
        tokens = (str(tokenizer.id_to_token(token)) for token in frame.control_ids)
        texts = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, texts))})" if texts else r"(?!)()")
        self._firsts = "".join(sorted({text[0] for text in texts}))
        self._end = str(tokenizer.id_to_token(frame.end_id))

    @classmethod
    def load(cls, base: Path) -> "ChatFormat":
        """Read the format of a base model's folder, without loading the model.

        Raises `ModelError` if the folder cannot be used.
        """
        frame = read_base_card(base).frame
        try:
            return cls(Tokenizer.from_file(str(base / "tokenizer.json")), frame)
        except Exception as error:  # tokenizers raises nothing else
            raise ModelError(f"{base}: no usable tokenizer: {one_line(error)}") from error

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.frame.end_id

    @property
    def pad_id(self) -> int:
        """The token that fills up batches; its value never matters."""
        return self.frame.pad_id

    @cached_property
    def num_frame(self) -> int:
        """How many tokens a prompt has at most besides those of its question."""
        return len(self.prompt("")) + 2

    def prompt(self, question: str) -> tuple[int, ...]:
        """Render a question."""
        before = self.frame.before
        text = before + question + self.frame.after
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        if not self.controls_in(question):
            return (*self.frame.begin_ids, *encoded.ids)
        first, last = len(before), len(before) + len(question)
        ids = list(self.frame.begin_ids)
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            is_asked = token in self._controls and first <= start and end <= last
            ids += self._plain_ids(text[start:end]) if is_asked else [token]
        return tuple(ids)

    def answer(self, text: str) -> tuple[int, ...]:
        """Tokenise an answer or option, without its end."""
        if self.controls_in(text):
            return tuple(self._plain_ids(text))
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def may_hold_controls(self, text: str) -> bool:
        """Tell whether a text has the first letter of a control token: few have."""
        return any(first in text for first in self._firsts)

    def controls_in(self, text: str) -> list[str]:
        """List the control tokens whose text stands in a text, each once."""
        return sorted(set(self._pattern.findall(text))) if self.may_hold_controls(text) else []

    def without_end(self, text: str) -> str:
        """Return an answer without the end tokens, and blanks around them, at its end."""
        if not text.rstrip().endswith(self._end):
            return text
        while (text := text.rstrip()).endswith(self._end):
            text = text.removesuffix(self._end)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Turn tokens into text, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def text(self, ids: Sequence[int]) -> str:
        """Turn the tokens of an answer into text, without white space around it."""
        return self.decode(ids).strip()

    @cached_property
    def _unaware(self) -> Tokenizer:
        """The tokenizer without its control tokens."""
        return plain_tokenizer(Tokenizer.from_str(self.tokenizer.to_str()))

    def _plain_ids(self, text: str) -> list[int]:
        """Tokenise the characters of a text, whatever they look like."""
        ids: list[int] = self._unaware.encode(text, add_special_tokens=False).ids
        if self._controls.isdisjoint(ids):
            return ids
        ids = []  # the vocabulary has the token as a word: it is told in two pieces
        for number, piece in enumerate(self._pattern.split(text)):
            for part in (piece[:1], piece[1:]) if number % 2 else (piece,):
                ids += self._unaware.encode(part, add_special_tokens=False).ids
        return ids


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Let a tokenizer take its control tokens in texts for plain text, and cut and pad nothing."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def render_frame(tokenizer: "PreTrainedTokenizerBase", system: str | None) -> Frame:
    """Render a tokenizer's chat template around a question, once and for all.

    `system` is the explicit system turn; it may be empty, as a template's own default would cost
    tokens in each prompt, or None for templates that know no such turn. A template that tells the
    date is told a fixed one. Without a template the question stands behind the tokens that the
    tokenizer itself puts in front; those that it puts behind are left out.

    Raises `ModelError` if the same question does not always give the same prompt, or none.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json; expected a tokenizer of the "
            f"library tokenizers (save it by AutoTokenizer, converted)"
        )
    backend: Tokenizer = tokenizer.backend_tokenizer
    if getattr(backend.model, "dropout", None):
        raise ModelError(
            f"the tokenizer drops merges at random (dropout {backend.model.dropout}), so that a "
            f"text has other tokens each time; set it to null"
        )
    end: int | None = tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no end-of-sequence token; set eos_token in it")
    before, after = "", ""
    begin_ids: tuple[int, ...] = ()
    if tokenizer.chat_template is None:
        begin_ids = _ids_in_front(backend)
    else:
        before, after = _around(tokenizer, system)
    pad: int | None = tokenizer.pad_token_id
    return Frame(
        before,
        after,
        begin_ids,
        end_id=end,
        pad_id=end if pad is None else pad,
        control_ids=_control_ids(backend, before + after),
    )


def _control_ids(tokenizer: Tokenizer, frame: str) -> tuple[int, ...]:
    """Return the tokens that texts may not hold: special ones, and those that the frame holds."""
    added = tokenizer.get_added_tokens_decoder()
    return tuple(id_ for id_, token in added.items() if token.special or token.content in frame)


def _ids_in_front(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that a tokenizer by itself puts in front of a text."""
    added = tokenizer.encode("a").special_tokens_mask
    return tuple(tokenizer.encode("a").ids[: added.index(0)] if 0 in added else ())


def _around(tokenizer: "PreTrainedTokenizerBase", system: str | None) -> tuple[str, str]:
    """Return the text before and after the question in a template."""
    rendered = _rendered(tokenizer, system)
    if rendered != _rendered(tokenizer, system):
        raise ModelError("the chat template renders the same turns otherwise each time")
    before, mark, after = rendered.partition(_MARK)
    if not mark or _MARK in after:
        raise ModelError("the chat template does not show the user's message exactly once")
    return before, after


def _rendered(tokenizer: "PreTrainedTokenizerBase", system: str | None) -> str:
    turns = [{"role": "user", "content": _MARK}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    from transformers.utils import chat_template_utils

    try:
        with replaced(chat_template_utils, "datetime", _StoppedClock):
            return str(
                tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            )
    except Exception as error:  # a template raises whatever it likes
        raise ModelError(
            f"the chat template refuses its turns: {one_line(error)}; without a system turn "
            f"(base_model.system_prompt: null) it may not"
        ) from error
