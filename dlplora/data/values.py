"""Values of rows as text: the one reading that each type has, whatever file it came from."""

import datetime
import decimal
import math
from typing import Any

_EXACT = 2**53  # beyond, not every whole number is a float


class UnreadableValueError(Exception):
    """What was found in place of text, to follow "has ": "an object"."""


def value_to_text(value: Any) -> str | None:
    """Return what a value says as text, or None where it is missing.

    | value | reading |
    |---|---|
    | text | itself |
    | null, not a number, not a time | missing |
    | whole number, also as 3.0 | its digits: 3 |
    | other number | as Python writes it: 0.5, 1e-05 |
    | truth value | true, false |
    | date, time | ISO 8601: 2024-07-26 |
    | bytes | their UTF-8 text |

    Raises `UnreadableValueError` for all else.
    """
    if type(value) is str:
        return value
    if is_missing(value):
        return None
    for kinds, reading in _READINGS:
        if isinstance(value, kinds):
            return str(reading(value))
    raise UnreadableValueError(kind_of(value))


def is_missing(value: Any) -> bool:
    """Tell whether a value stands for none: null, or what is not even equal to itself."""
    return value is None or (not isinstance(value, list | dict) and bool(value != value))


def kind_of(value: Any) -> str:
    """Name the type of a value for a message."""
    for kinds, name in _KINDS:
        if isinstance(value, kinds):
            return name
    return f"a {type(value).__name__}"


def _number(value: float | decimal.Decimal) -> str:
    if not math.isfinite(value):
        raise UnreadableValueError(f"the number {value}")
    if value != int(value):
        return str(value)
    if isinstance(value, float) and abs(value) >= _EXACT:
        raise UnreadableValueError("a whole number too large to be read exactly without quotes")
    return str(int(value))


def _bytes(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise UnreadableValueError("bytes that are not UTF-8") from None


_READINGS: tuple[tuple[Any, Any], ...] = (
    (str, str),
    (bool, lambda value: str(value).lower()),
    (int, str),
    (float | decimal.Decimal, _number),
    (datetime.date | datetime.time, lambda value: value.isoformat()),
    (bytes, _bytes),
)
_KINDS: tuple[tuple[Any, str], ...] = (
    (dict, "an object"),
    (list, "a list"),
    (str, "text"),
    (bool, "a truth value"),
    (int | float, "a number"),
    (type(None), "null"),
)
