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
        span = len(before), len(before) + len(question)
        return self.encode(before + question + self.frame.after, [span])

    def raw(self, text: str) -> tuple[int, ...]:
        """Tokenise a text without a template, behind what the tokenizer itself puts in front."""
        return (*self._front_ids, *self._encoded(text, [(0, len(text))]))

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        """Tokenise a whole prompt, behind the tokens that begin every one.

        What looks like a control token is plain text within the spans.
        """
        return (*self.frame.begin_ids, *self._encoded(text, spans))

    def _encoded(self, text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        plain = [span for span in spans if self.controls_in(text[slice(*span)])]
        if not plain:
            return list(encoded.ids)
        ids: list[int] = []
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            inner = next((one for one in plain if one[0] < end and start < one[1]), None)
            if token in self._controls and inner:  # also blanks beside it
                part = text[max(start, inner[0]) : min(end, inner[1])]
                if self.controls_in(part):
                    ids += self._plain_ids(part)
                    continue
            ids.append(token)
        return ids

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

    def token_text(self, token: int) -> str:
        """Turn one token into text, as the vocabulary has it if it is special."""
        if token in self._controls:
            return str(self.tokenizer.id_to_token(token))
        return str(self.tokenizer.decode([token], skip_special_tokens=False))

    def text(self, ids: Sequence[int]) -> str:
        """Turn the tokens of an answer into text, without white space around it."""
        return self.decode(ids).strip()

    @cached_property
    def _front_ids(self) -> tuple[int, ...]:
        return ids_in_front(self.tokenizer)

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


def ids_in_front(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens that a tokenizer by itself puts in front of a text."""
    encoded = tokenizer.encode("a")
    added = encoded.special_tokens_mask
    return tuple(encoded.ids[: added.index(0)] if 0 in added else ())


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Let a tokenizer take its control tokens in texts for plain text, and cut and pad nothing."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
