"""Raw rows as items: fields found by name, each checked.

Every rule looks at one row alone, so that the order of rows changes nothing.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, NamedTuple

import orjson

from dlplora.data.raw import Unreadable
from dlplora.errors import DataError
from dlplora.params import Keys

KNOWN_KEYS = (("Q", "A"), ("question", "answer"), ("input", "output"))
OPTIONS_KEY, BARE_KEY = "options", "bare"
_NUM_NAMES, _NAME_CHARS = 20, 80
_SHORT = Repr()
_SHORT.maxstring, _SHORT.maxlist = 200, 6


class Item(NamedTuple):
    """A good row: a question, its answers and, for multiple choice, its options."""

    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...] | None
    bare: str | None


class _Fields(NamedTuple):
    """The keys of a row by what they hold; unlike `Keys` as quick to read as a tuple."""

    question: str
    answer: str
    options: str | None


class BadRowError(Exception):
    """What is wrong with one row, to follow "item 17 "."""


class Reader:
    """Rows → items. Remembers which keys it met, for `settled_keys`.

    With `keys` "auto" each row's fields are found among the known pairs, in any case. With
    `text_cells` a cell that holds a JSON list of strings counts as that list.
    """

    def __init__(self, keys: Literal["auto"] | Keys, *, text_cells: bool) -> None:
        self._named = None if keys == "auto" else _Fields(**keys.model_dump())
        self._text_cells = text_cells
        self._layouts: dict[tuple[str, ...], _Fields | None] = {}

    def item(self, row: Any) -> Item:
        """Check one row; `BadRowError` says what is wrong with it."""
        if type(row) is not dict:
            if isinstance(row, Unreadable):
                raise BadRowError(row.problem)
            raise BadRowError(f"is {_kind(row)}, expected an object")
        names = tuple(row)
        try:
            fields = self._layouts[names]
        except KeyError:
            fields = self._named or _known_fields(names)
            if len(self._layouts) < _MOST_LAYOUTS or fields not in self._layouts.values():
                self._layouts[names] = fields
        if fields is None:
            raise BadRowError(_lacks(row))
        question_key, answer_key, options_key = fields
        question = row.get(question_key)
        if type(question) is not str or not question or question.isspace() or "\0" in question:
            raise BadRowError(_what_is_wrong(row, question_key))
        answers = self._texts(row, answer_key)
        if len(answers) > 1:
            answers = tuple(sorted(set(answers)))
        options = None
        if options_key is not None and row.get(options_key) not in _NO_OPTIONS:
            options = self._texts(row, options_key)
            _check_options(options, answers)
        bare = row.get(BARE_KEY)
        values = (question, answers, options, bare if type(bare) is str else None)
        return tuple.__new__(Item, values)  # as Item(*values), in half the time

    def _texts(self, row: Mapping[str, Any], key: str) -> tuple[str, ...]:
        value: Any = row.get(key)
        if type(value) is str:
            if self._text_cells and value.startswith("["):
                value = _cell_list(value)
            elif value and not value.isspace() and "\0" not in value:  # nearly every row
                return (value,)
        texts: tuple[Any, ...] = tuple(value) if type(value) is list else (value,)
        if not texts:
            raise BadRowError(f"has an empty list as {key!r}")
        for text in texts:
            if type(text) is not str or not text or text.isspace() or "\0" in text:
                raise BadRowError(_what_is_wrong({**row, key: text} if key in row else row, key))
        return texts

    @property
    def met_objects(self) -> bool:
        """Tell whether any row had fields at all."""
        return bool(self._layouts)

    def settled_keys(self, file: Path) -> Keys:
        """Return the one naming of all rows; `DataError` if there are several or none."""
        layouts = [fields for fields in self._layouts.values() if fields]
        pairs = {(fields.question, fields.answer) for fields in layouts}
        if len(pairs) == 1:
            ((question, answer),) = pairs
            options = [fields.options for fields in layouts if fields.options]
            return Keys(question=question, answer=answer, options=min(options, default=None))
        known = " or ".join(f"{question}/{answer}" for question, answer in KNOWN_KEYS)
        found = _listed(dict.fromkeys(name for names in self._layouts for name in names))
        raise DataError(
            f"{file}: found the keys {found}; expected one pair of "
            f"{known} in all rows, or name them by --keys (in params.yaml: tasks.<task>.keys)"
        )


_MOST_LAYOUTS = 1000  # rows with a key of their own each are not remembered for ever
_NO_OPTIONS = (None, "")  # an empty cell of CSV


def _known_fields(names: tuple[str, ...]) -> _Fields | None:
    """Find the one known pair among the keys of a row, in any case."""
    folded = {name.casefold(): name for name in sorted(names, reverse=True)}
    pairs = [
        (folded[question.casefold()], folded[answer.casefold()])
        for question, answer in KNOWN_KEYS
        if question.casefold() in folded and answer.casefold() in folded
    ]
    if len(pairs) != 1:
        return None
    question, answer = pairs[0]
    return _Fields(question, answer, folded.get(OPTIONS_KEY))


def _lacks(row: Mapping[str, Any]) -> str:
    """Say which field of a pair a row lacks, if it has the other."""
    folded = {name.casefold() for name in row}
    names = _listed(row)
    for question, answer in KNOWN_KEYS:
        if {question.casefold(), answer.casefold()} <= folded:
            return f"has more than one pair of a question and an answer (keys: {names})"
        if question.casefold() in folded:
            return f"has no {answer!r} (keys: {names})"
        if answer.casefold() in folded:
            return f"has no {question!r} (keys: {names})"
    return f"has no question and no answer (keys: {names})"


def _check_options(options: tuple[str, ...], answers: tuple[str, ...]) -> None:
    if len(options) < 2 or len(set(options)) < len(options):
        raise BadRowError(
            f"has the options {_SHORT.repr(list(options))}, expected at least two, all different"
        )
    for answer in answers:
        if answer not in options:
            raise BadRowError(
                f"has the answer {_SHORT.repr(answer)}, which is not among its options"
            )


def _cell_list(cell: str) -> Any:
    """Return the strings of a cell that is a JSON list of them, else the cell itself."""
    try:
        value = orjson.loads(cell)
    except orjson.JSONDecodeError:
        return cell
    is_texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return value if is_texts else cell


def _what_is_wrong(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return f"has no {key!r} (keys: {_listed(row)})"
    value = row[key]
    if not isinstance(value, str):
        return f"has {_kind(value)} as {key!r}, expected a string"
    if not value.strip():
        return f"has an empty {key!r}"
    return f"has a NUL character in {key!r}"


def _listed(names: Iterable[str]) -> str:
    """List the first names of a row or file in one line."""
    listed = [" ".join(name.split())[:_NAME_CHARS] for name in islice(names, _NUM_NAMES + 1)]
    if len(listed) > _NUM_NAMES:
        listed[-1] = "…"
    return ", ".join(listed) or "none"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")  # Parquet has dates, bytes, …
