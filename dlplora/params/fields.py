"""What sections of parameters are made of: names, counts, and the frozen section itself."""

import re
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Annotated, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic_core import ErrorDetails

from dlplora.errors import ParamsError, choices

T = TypeVar("T")
M = TypeVar("M", bound="Section")
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_UNQUOTABLE = re.compile(r'["$`\\]')  # what a shell reads between double quotes
_DEVICES = {"con", "prn", "aux", "nul"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in range(10)
}
_RESERVED = {"default", "base", "single", "none"}  # systems are named so


def is_plain(name: str) -> bool:
    """Tell whether a name may stand in paths, as that of a system."""
    return _IDENTIFIER.fullmatch(name) is not None and name.lower() not in _DEVICES


def is_identifier(name: str) -> bool:
    """Tell whether a name may stand for a task, router or other entry."""
    return is_plain(name) and name.lower() not in _RESERVED


def _plain(name: str) -> str:
    if not is_plain(name):
        raise ValueError(
            f"{name[:80]!r} is no plain identifier: use a letter, then up to 63 letters, digits, _"
        )
    return name


def _identifier(name: str) -> str:
    if name.lower() in _RESERVED:
        raise ValueError(f"{name!r} is reserved; choose another name")
    return _plain(name)


def _text(name: object) -> object:
    if name is None or isinstance(name, bool | int | float):
        raise ValueError("YAML takes it for a value; put the name in quotes")
    return name


def _path(path: str) -> str:
    if not path or _CONTROL.search(path):
        raise ValueError("expected a path without line breaks and control characters")
    return path


def _data_path(path: str) -> str:
    parts = PurePosixPath(path).parts
    if parts[:1] != ("data",) or ".." in parts:
        raise ValueError("expected a path under data/")
    return path


def _command_path(path: str) -> str:
    if path.startswith("-") or _UNQUOTABLE.search(path):
        raise ValueError('the path is part of a command: no ", $, ` or \\, and no - in front')
    return path


Name = Annotated[str, BeforeValidator(_text), AfterValidator(_identifier)]
SystemName = Annotated[str, BeforeValidator(_text), AfterValidator(_plain)]
LocalPath = Annotated[str, AfterValidator(_path)]
CommandPath = Annotated[LocalPath, AfterValidator(_command_path)]  # in a `cmd` of dvc.yaml
DataPath = Annotated[CommandPath, AfterValidator(_data_path)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Revision = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]  # a whole commit: tags and branches move
HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")]


class Section(BaseModel):
    """A frozen group of parameters that knows all its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def named(section: dict[str, T], name: str, title: str) -> T:
    """Return one entry of a section of params, or say which there are."""
    if name not in section:
        raise ParamsError(f"params.yaml: no {title}.{name}; there are: {choices(section)}")
    return section[name]


def checked(kind: type[M], values: object, source: str, *, within: str = "") -> M:
    """Make a section of parsed YAML; `ParamsError` says which value of the file is wrong.

    `source` is the file, `within` where in it the values stand.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        where = ".".join(filter(None, [within, *_keys(first["loc"], values)])) or "the whole file"
        raise ParamsError(f"{source}: {where}: {_told(first)}{more}") from error


def _keys(loc: Sequence[int | str], values: object) -> list[str]:
    """Return where a value stands in a file, without pydantic's names for what it tried there."""
    parts = []
    for part in loc:
        if isinstance(values, dict | list) and part in _keys_of(values):
            parts.append(part)
            values = values[part]  # type: ignore[index]
        elif isinstance(values, dict | list) and part == loc[-1] and part != "[key]":
            parts.append(part)  # it is missing
    return [str(part) for part in parts]


def _keys_of(values: dict[int | str, object] | list[object]) -> Collection[int | str]:
    return values.keys() if isinstance(values, dict) else range(len(values))


def _told(error: ErrorDetails) -> str:
    """Say what is wrong with a value, and which it was."""
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "union_tag_not_found":
        return "has no kind"
    if error["type"] == "union_tag_invalid":
        return f"no kind {error['ctx']['tag']!r}; there are: {error['ctx']['expected_tags']}"
    found = repr(error["input"])[:80]
    return f"{error['msg'].removeprefix('Value error, ')}; found {found}"
