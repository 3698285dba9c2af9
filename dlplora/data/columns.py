"""Columns found by name: which hold the question, the answer and what stands beside them."""

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

from dlplora.params.inputs import Keys

# The columns that "auto" knows, in any case. A row has one question and one answer; what stands
# in front of the question becomes part of it. An instruction may do without a question.
QUESTIONS = ("Q", "question", "input", "prompt")
ANSWERS = ("A", "answer", "answers", "output", "completion", "response")
CONTEXTS = ("instruction", "title", "context", "passage")
OPTIONS_KEY, BARE_KEY = "options", "bare"
KNOWN = (
    f"one of {'/'.join(QUESTIONS)} and one of {'/'.join(ANSWERS)}, with {'/'.join(CONTEXTS)} in "
    f"front"
)
# Columns that number or name a row carry nothing of its task.
_IDENTIFIER = re.compile(r"((.*[ _-])?(id|ids|idx|index|uid|guid|uuid)|unnamed: \d+|)")
_NUM_NAMES, _NAME_CHARS = 20, 80


class Columns(NamedTuple):
    """The keys of a row by what they hold; unlike `Keys` as quick to read as a tuple.

    The question is what stands under `parts`, one below another. Nobody reads what is `unused`.
    """

    question: str
    answer: str
    options: str | None
    bare: str | None
    parts: tuple[str, ...]
    unused: tuple[str, ...]


def named_columns(keys: Keys) -> Columns:
    """Return the columns that a user names; all others are left out."""
    parts = (*keys.context, keys.question)
    if clean_name(keys.question) == "instruction":  # which comes first, as `known_columns` has it
        parts = (keys.question, *keys.context)
    return Columns(keys.question, keys.answer, keys.options, None, parts, ())


def known_columns(names: tuple[str, ...]) -> Columns | None:
    """Find the one known question and answer among the keys of a row, in any case."""
    known = {clean_name(name): name for name in sorted(names, reverse=True)}
    fronts = [known[key] for key in CONTEXTS if key in known]
    questions = [known[key.casefold()] for key in QUESTIONS if key.casefold() in known]
    answers = [known[key.casefold()] for key in ANSWERS if key.casefold() in known]
    instruction = known.get("instruction")
    if len(questions) + (instruction is not None) == 0 or len(questions) > 1 or len(answers) != 1:
        return None
    is_behind = not questions or questions[0] == known.get("input")  # Alpaca's `input` may be empty
    question = instruction if instruction is not None and is_behind else questions[0]
    parts = (*fronts, *questions)
    options = known.get(OPTIONS_KEY)
    bare = known.get(BARE_KEY)
    used = {*parts, *answers, options, bare}
    unused = [n for n in names if n not in used and not _IDENTIFIER.fullmatch(clean_name(n))]
    return Columns(question, answers[0], options, bare, parts, tuple(unused))


def clean_name(name: str) -> str:
    """Return a key as it is compared: without blanks and marks around it, in any case."""
    return name.strip("\ufeff").strip().casefold()


def lacks(row: Mapping[str, Any]) -> str:
    """Say which field a row lacks, or has twice."""
    known = {clean_name(name) for name in row}
    names = listed(row)
    has_question = any(key.casefold() in known for key in (*QUESTIONS, "instruction"))
    has_answer = any(key.casefold() in known for key in ANSWERS)
    if has_question and has_answer:
        return f"has more than one question or answer (keys: {names})"
    if has_question:
        return f"has no answer (keys: {names})"
    return f"has no question{'' if has_answer else ' and no answer'} (keys: {names})"


def listed(names: Iterable[str]) -> str:
    """List the first names of a row or file in one line."""
    first = [" ".join(name.split())[:_NAME_CHARS] for name in islice(names, _NUM_NAMES + 1)]
    if len(first) > _NUM_NAMES:
        first[-1] = "…"
    return ", ".join(first) or "none"
