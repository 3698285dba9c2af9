"""Texts as words, whatever their script."""

from functools import cache
from typing import Any

import regex

# Scripts that put no blanks between words: each letter, with its marks, counts as one.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"(?V1)[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+")
_TERM = regex.compile(rf"(?V1)[{_UNSPACED}]\p{{M}}*|[[\w\p{{M}}]--[{_UNSPACED}]]+|[^\w\s\p{{M}}]")
_STEMMED = regex.compile(r"[a-z0-9]{4,}")  # as rouge-score does
_JAPANESE = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
_CHINESE = regex.compile(r"\p{Han}")
_LETTER = regex.compile(r"\p{L}")
_UNSPACED_LETTER = regex.compile(rf"[{_UNSPACED}]")


def words_of(text: str) -> list[str]:
    """Split a text into words in small letters; one without any into its signs.

    Of ASCII text they are those of rouge-score's own tokenizer, before stemming.
    """
    lowered = text.lower()
    return _WORD.findall(lowered) or [sign for sign in lowered if not sign.isspace()]


def terms_of(text: str) -> list[str]:
    """Split a text into words and signs, in the letters that it is given in."""
    terms: list[str] = _TERM.findall(text)
    return terms


class StemmedWords:
    """The words of a text, English endings cut off: a tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        """Split a text into stemmed words."""
        stem = _stemmer().stem
        return [stem(word) if _STEMMED.fullmatch(word) else word for word in words_of(text)]


@cache
def _stemmer() -> Any:
    from nltk.stem import porter

    return porter.PorterStemmer()


def bleu_tokenizer(text: str) -> str:
    """Return the name of sacrebleu's tokenizer for the script of a text.

    That of its standard, 13a, parts words at blanks; others are for texts that are mostly, by
    letters, of scripts without blanks.
    """
    num_letters = len(_LETTER.findall(text))
    if 2 * len(_UNSPACED_LETTER.findall(text)) <= num_letters:
        return "13a"
    if _JAPANESE.search(text):
        return "ja-mecab"
    return "zh" if _CHINESE.search(text) else "char"
