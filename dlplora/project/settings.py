"""Values of params.yaml, set and removed by their paths, such as adapters.capitals.steps."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pydantic import ValidationError

from dlplora.errors import ParamsError, choices
from dlplora.params.load import load_params, parse_params
from dlplora.params.training import Adapter
from dlplora.params.yaml import parse_yaml
from dlplora.project.files import Project
from dlplora.project.yaml_values import remove_value, set_value, written

_UNKNOWN = {"extra_forbidden", "dict_type", "model_type", "model_attributes_type"}  # of pydantic
_OVERRIDES = set(Adapter.model_fields) - {"max_tokens"}  # which is the same for all tasks
_BY_HAND = "shared by an anchor or written in a way that cannot be edited here; edit the file"


class Absent(Enum):
    """What stands for a value that is not there."""

    NOT_SET = "not set"


NOT_SET = Absent.NOT_SET


@dataclass(frozen=True)
class Change:
    """A value before and after; where an override is absent, the value of `adapter` holds."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.before)} -> {_shown(self.after)}"


def parse_values(words: Sequence[str]) -> dict[str, Any]:
    """Map the paths of words PATH=VALUE to their values, read as YAML; raises `ParamsError`."""
    values: dict[str, Any] = {}
    for word in words:
        path, _, text = word.partition("=")
        if not path or "=" not in word:
            raise ParamsError(f"{word}: expected PATH=VALUE, such as adapter.rank=16")
        if not text.strip():
            raise ParamsError(
                f"{word} has no value; expected {path}=null, --unset {path}, or {path}=\"''\" for "
                f"an empty text"
            )
        if path in values:
            raise ParamsError(f"{path}: given twice")
        values[path] = parse_yaml(text, path)
        if isinstance(values[path], dict):
            raise ParamsError(
                f"{path}: expected a value or a list, found a mapping; put text with a colon in "
                f"quotes"
            )
    return values


def set_values(
    project: Project, values: Mapping[str, Any], *, unset: Sequence[str] = ()
) -> list[Change]:
    """Set values of params.yaml and remove others, all or none; return those that changed.

    Raises `ParamsError` for a path that leads to no value, and for what the schema refuses. Waits
    for a running pipeline before it writes.
    """
    load_params(project.params_file)  # it says what is wrong outside a project
    if twice := [path for path in unset if path in values or unset.count(path) > 1]:
        raise ParamsError(f"{twice[0]}: given twice")
    changes, _ = _plan(project, values, unset)  # a mistake is told without waiting
    if changes:
        with project.alone():
            changes, text = _plan(project, values, unset)
            project.replace(text)
    return changes


def _plan(
    project: Project, values: Mapping[str, Any], unset: Collection[str]
) -> tuple[list[Change], str]:
    """Return what changes, and the text of params.yaml with it; nothing is written."""
    source = str(project.params_file)
    text = project.params_file.read_text(encoding="utf-8")
    before, wanted = _parsed(text, source), _parsed(text, source)
    for path, value in values.items():
        section, name = _place(wanted, path)
        section[name] = value
    for path in unset:
        section, name = _place(wanted, path)
        if name not in section:
            raise ParamsError(f"params.yaml: no {path}; there are: {choices(section)}")
        del section[name]
    try:
        after = parse_params(wanted, source).model_dump(mode="json")
    except ParamsError as error:
        _explain(error, before, values)
        raise
    paths = [path for path in (*values, *unset) if _at(before, path) != _at(after, path)]
    for path in paths:
        text = _edited(text, path, values, source)
    if paths and _parsed(text, source) != after:
        raise ParamsError(f"{source}: {choices(paths)}: {_BY_HAND}")
    return [Change(path, _effective(before, path), _effective(after, path)) for path in paths], text


def _parsed(text: str, source: str) -> dict[str, Any]:
    return parse_params(parse_yaml(text, source), source).model_dump(mode="json")


def _edited(text: str, path: str, values: Mapping[str, Any], source: str) -> str:
    keys = path.split(".")
    try:
        return set_value(text, keys, values[path]) if path in values else remove_value(text, keys)
    except KeyError as error:
        raise ParamsError(f"{source}: {path}: {_BY_HAND}") from error


def _place(values: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """Return the section that holds the value of a path, or may hold it, and its name there."""
    *parents, name = path.split(".")
    section = values
    for number, key in enumerate(parents, start=1):
        there = ".".join(parents[:number])
        if key not in section:
            raise ParamsError(f"params.yaml: no {there}; there are: {choices(section)}")
        if not isinstance(section[key], dict):
            raise ParamsError(f"params.yaml: no {path}; {there} is a value, not a section")
        section = section[key]
    if isinstance(section.get(name), dict):
        known = _known(section[name], path)
        raise ParamsError(
            f"params.yaml: {path} is a section; expected the path of a value in it: "
            f"{choices(known)}"
        )
    return section, name


def _explain(error: ParamsError, before: dict[str, Any], paths: Collection[str]) -> None:
    """Raise `ParamsError` with the names there are if the schema does not know one of the paths."""
    if not isinstance(error.__cause__, ValidationError):
        return
    first = error.__cause__.errors(include_url=False)[0]
    for path in paths:
        parent, _, name = path.rpartition(".")
        if first["type"] in _UNKNOWN and first["loc"][-1] == name and _at(before, path) is NOT_SET:
            known = _known(_at(before, parent) if parent else before, parent)
            raise ParamsError(f"params.yaml: no {path}; there are: {choices(known)}") from error


def _known(section: Collection[str], path: str) -> Collection[str]:
    """Return the names that a section has, or may have if it overrides `adapter`."""
    return _OVERRIDES if _overrides_adapter(path) else section


def _overrides_adapter(section: str) -> bool:
    """Tell whether the values of a section override those of `adapter`."""
    match section.split("."):
        case ["adapters" | "joint", _] | ["experts", _, "training"]:
            return True
    return False


def _effective(values: dict[str, Any], path: str) -> Any:
    """Return the value of a path; of an absent override, that of `adapter`."""
    section, _, name = path.rpartition(".")
    value = _at(values, path)
    if value is NOT_SET and _overrides_adapter(section):
        return values["adapter"].get(name, NOT_SET)
    return value


def _at(values: dict[str, Any], path: str) -> Any:
    for key in path.split("."):
        if key not in values:
            return NOT_SET
        values = values[key]
    return values


def _shown(value: Any) -> str:
    return str(value.value) if isinstance(value, Absent) else written(value)
