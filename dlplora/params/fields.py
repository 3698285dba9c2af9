"""What sections of parameters are made of: names, counts, and the frozen section itself."""

import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from dlplora.errors import ParamsError, choices

T = TypeVar("T")
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_RESERVED = {"con", "prn", "aux", "nul", "default", "base", "single", "none"} | {
    f"{port}{number}" for port in ("com", "lpt") for number in range(10)
}


def is_identifier(name: str) -> bool:
    """Tell whether a name may stand for a task, system or router, and so in paths."""
    return _IDENTIFIER.fullmatch(name) is not None and name.lower() not in _RESERVED


def _identifier(name: str) -> str:
    if not is_identifier(name):
        raise ValueError(
            f"{name[:80]!r} is no plain identifier: use a letter, then up to 63 letters, digits, _"
        )
    return name


Name = Annotated[str, AfterValidator(_identifier)]
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
