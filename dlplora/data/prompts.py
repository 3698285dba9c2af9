"""Prompts and answers as token ids: plain text within the base model's own template."""

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from dlplora.errors import ModelError, errors_as
from dlplora.records.base_card import Frame, read_base_card


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
        with errors_as(ModelError, f"{base}: no usable tokenizer"):
            return cls(Tokenizer.from_file(str(base / "tokenizer.json")), frame)

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.frame.end_id

    @property
    def pad_id(self) -> int:
        """The token that fills up batches; its value never matters."""
        return self.frame.pad_id

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
            if token in self._controls and first < end and start < last:  # also blanks beside it
                start, end = max(start, first), min(end, last)
                if self.controls_in(text[start:end]):
                    ids += self._plain_ids(text[start:end])
                    continue
            ids.append(token)
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
