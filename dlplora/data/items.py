"""Raw rows as items: fields found by name, each checked.

Every rule looks at one row alone, so that the order of rows changes nothing.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, NamedTuple

import orjson

from dlplora.data.columns import KNOWN, Columns, known_columns, lacks, listed, named_columns
from dlplora.data.limits import ItemLimit
from dlplora.data.raw import Unreadable
from dlplora.data.values import UnreadableValueError, is_missing, kind_of, value_to_text
from dlplora.errors import DataError
from dlplora.params.inputs import Keys

_NUMBER = re.compile(r"\s*([-+]?[\d.,]+([eE][-+]?\d+)?%?|true|false)\s*", re.IGNORECASE)
_SHORT = Repr()
_SHORT.maxstring, _SHORT.maxlist = 200, 6


class Item(NamedTuple):
    """A good row: a question, its answers and, for multiple choice, its options."""

    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...] | None
    bare: str | None


class BadRowError(Exception):
    """What is wrong with one row, to follow "item 17 "."""


class Reader:
    """Rows → items. Remembers which keys it met, for `settled_keys`.

    With `keys` "auto" each row's fields are found among the known ones, in any case. With
    `text_cells` a cell that holds a JSON list of strings counts as that list. With a `limit`
    items that are too long are bad, and an end token at an answer's end is stripped; `stripped`
    and `controls` count what was met.
    """

    def __init__(
        self, keys: Literal["auto"] | Keys, *, text_cells: bool, limit: ItemLimit | None = None
    ) -> None:
        self._keys = None if keys == "auto" else keys
        self._text_cells = text_cells
        self._limit = limit
        self._layouts: dict[tuple[str, ...], Columns | None] = {}
        self._carries_text: set[str] = set()  # of the columns that nobody reads
        self.controls: Counter[str] = Counter()  # answers, questions and options that hold a token
        self.stripped = 0  # answers and options that ended in the end token

    def item(self, row: Any) -> Item:
        """Check one row; `BadRowError` says what is wrong with it."""
        if type(row) is not dict:
            if isinstance(row, Unreadable):
                raise BadRowError(row.problem)
            raise BadRowError(f"is {kind_of(row)}, expected an object")
        names = tuple(row)
        try:
            fields = self._layouts[names]
        except KeyError:
            fields = known_columns(names) if self._keys is None else named_columns(self._keys)
            if len(self._layouts) < _MOST_LAYOUTS or fields not in self._layouts.values():
                self._layouts[names] = fields
        if fields is None:
            raise BadRowError(lacks(row))
        question_key, answer_key, options_key, bare_key, parts, unused = fields
        question: Any = row.get(question_key)
        if len(parts) > 1 or not _is_plain(question):
            question = joined(row, question_key, parts)
        answers = self._texts(row, answer_key)
        options = None
        if options_key is not None and row.get(options_key) not in _NO_OPTIONS:
            options = self._texts(row, options_key)
        if self._limit is not None:
            answers, options = self._within(self._limit, question, answers, options)
        if len(answers) > 1:
            answers = tuple(sorted(set(answers)))
        if options is not None:
            _check_options(options, answers)
        for name in unused:
            if name not in self._carries_text and self._is_text(row.get(name)):
                self._carries_text.add(name)
        bare = None if bare_key is None else row.get(bare_key)
        values = (question, answers, options, bare if type(bare) is str else None)
        return tuple.__new__(Item, values)  # as Item(*values), in half the time

    def _texts(self, row: Mapping[str, Any], key: str) -> tuple[str, ...]:
        value: Any = row.get(key)
        if type(value) is str:
            if self._text_cells and value.startswith("["):
                value = _cell_list(value)
            elif _is_plain(value):  # nearly every row
                return (value,)
        if type(value) is dict and type(value.get("text")) is list:  # as in SQuAD
            value = value["text"]
        values = value if type(value) is list else [value]
        if not values:
            raise BadRowError(f"has an empty list as {key!r}")
        return tuple(_text(row, key, part) for part in values)

    def _within(
        self,
        limit: ItemLimit,
        question: str,
        answers: tuple[str, ...],
        options: tuple[str, ...] | None,
    ) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
        """Strip end tokens from answers and options; `BadRowError` if the item is too long."""
        texts = (*answers, *(options or ()))
        if limit.is_harmless("".join((question, *texts))):  # nearly every row
            return answers, options
        whole = tuple(map(limit.chat.without_end, texts))
        if "" in whole:
            raise BadRowError(f"has an answer of nothing but {texts[whole.index('')]!r}")
        self.stripped += sum(old != new for old, new in zip(texts, whole, strict=True))
        for text in (question, *whole):
            self.controls.update(limit.chat.controls_in(text))
        if problem := limit.problem(question, whole):
            raise BadRowError(problem)
        return whole[: len(answers)], whole[len(answers) :] if options else None

    def _is_text(self, value: Any) -> bool:
        """Tell whether a value carries text: a string that says something, a list or an object.

        A cell that holds a number or a truth value is one.
        """
        if isinstance(value, str):
            return bool(value.strip()) and not (self._text_cells and _NUMBER.fullmatch(value))
        return isinstance(value, list | dict | bytes) and bool(value)

    @property
    def met_objects(self) -> bool:
        """Tell whether any row had fields at all."""
        return bool(self._layouts)

    def settled_keys(self, file: Path) -> Keys:
        """Return the one naming of all rows.

        Raises `DataError` if there are several or none, or if a column that nobody reads carries
        text and the keys were not named.
        """
        layouts = [fields for fields in self._layouts.values() if fields]
        pairs = {(fields.question, fields.answer) for fields in layouts}
        if len(pairs) != 1:
            found = listed(dict.fromkeys(name for names in self._layouts for name in names))
            raise DataError(
                f"{file}: found the keys {found}; expected the same in all rows, {KNOWN}, or "
                f"names by --keys (in params.yaml: tasks.<task>.keys)"
            )
        if self._carries_text and self._keys is None:
            unread = listed(map(repr, sorted(self._carries_text)))
            raise DataError(
                f"{file}: {unread}: carries text that would not be used; name the keys that are, "
                f"by --keys and --context (in params.yaml: tasks.<task>.keys)"
            )
        if self._keys is not None:
            met = {name for names in self._layouts for name in names}
            named = [*self._keys.context, *([self._keys.options] if self._keys.options else [])]
            if missing := [key for key in named if key not in met]:
                raise DataError(
                    f"{file}: no {missing[0]!r} in any row (keys: {listed(sorted(met))})"
                )
            return self._keys
        ((question, answer),) = pairs
        options = [fields.options for fields in layouts if fields.options]
        longest = max((fields.parts for fields in layouts), key=lambda parts: (len(parts), parts))
        return Keys(
            question=question,
            answer=answer,
            options=min(options, default=None),
            context=[part for part in longest if part != question],
        )


_MOST_LAYOUTS = 1000  # rows with a key of their own each are not remembered for ever
_NO_OPTIONS = (None, "")  # an empty cell of CSV


def joined(row: Mapping[str, Any], question: str, parts: Iterable[str]) -> str:
    """Return the parts of a question, one below another; those that are empty are left out.

    The one under the key `question` has to be there; `BadRowError` says what is wrong.
    """
    texts = []
    for key in parts:
        value = row.get(key)
        is_empty = is_missing(value) or (isinstance(value, str) and not value.strip())
        if key == question or not is_empty:
            texts.append(_text(row, key, value))
    return "\n".join(texts)


def _text(row: Mapping[str, Any], key: str, value: Any) -> str:
    """Return a value as text; `BadRowError` says what is wrong with it."""
    if key not in row:
        raise BadRowError(f"has no {key!r} (keys: {listed(row)})")
    try:
        text = value_to_text(value)
    except UnreadableValueError as error:
        raise BadRowError(f"has {error} as {key!r}, expected text") from None
    if text is None:
        raise BadRowError(f"has {kind_of(None)} as {key!r}, expected text")
    if not text or text.isspace():
        raise BadRowError(f"has an empty {key!r}")
    if "\0" in text:
        raise BadRowError(f"has a NUL character in {key!r}")
    return text


def _is_plain(value: Any) -> bool:
    """Tell whether a value is text that nothing is wrong with."""
    return type(value) is str and bool(value) and not value.isspace() and "\0" not in value


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
    is_texts = isinstance(value, list) and all(isinstance(text, str) for text in value) and value
    return value if is_texts else cell
