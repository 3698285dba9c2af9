"""Edits of single values in a text of YAML: every other byte stays."""

from collections.abc import Sequence
from io import StringIO
from typing import Any

from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.nodes import CollectionNode, MappingNode, Node
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from dlplora.project.files import round_trip


def set_value(text: str, path: Sequence[str], value: Any) -> str:
    """Replace the value at a path, or add it to the mapping of its parent.

    Raises `KeyError` if there is no such mapping, as where YAML merges it from another.
    """
    section, new = _section(text, path[:-1]), written(value)
    for key, node in section.value:
        if key.value == path[-1]:
            start, end = _start(text, key, node), _end(text, key, node)
            indent = key.start_mark.column + 2 - node.start_mark.column  # a list may stand below
            blanks = 1 if start == end else max(0, indent)
            return f"{text[:start]}{' ' * blanks}{new}{text[end:]}"
    entry = f"{written(path[-1])}: {new}"
    if not section.value:
        return _inserted(text, section.end_mark.index - 1, entry)
    last = _end(text, *section.value[-1])
    if section.flow_style:
        return _inserted(text, last, f", {entry}")
    column = section.value[0][0].start_mark.column
    return _inserted(text, _line_end(text, last), f"\n{' ' * column}{entry}")


def remove_value(text: str, path: Sequence[str]) -> str:
    """Remove an entry of a mapping, with the comment on its line; raises `KeyError`."""
    section = _section(text, path[:-1])
    names = [key.value for key, _ in section.value]
    if path[-1] not in names:
        raise KeyError(path[-1])
    place = names.index(path[-1])
    key, node = section.value[place]
    start, end = key.start_mark.index, _end(text, key, node)
    if section.flow_style and len(names) == 1:
        start, end = section.start_mark.index, section.end_mark.index
    elif section.flow_style and place:
        return text[: _end(text, *section.value[place - 1])] + text[end:]
    elif section.flow_style:
        return text[:start] + text[section.value[1][0].start_mark.index :]
    elif len(names) > 1:
        return text[: text.rfind("\n", 0, start) + 1] + text[_line_end(text, end) + 1 :]
    return f"{text[:start]}{{}}{text[end:]}"


def written(value: Any) -> str:
    """Return a value or list as one line of YAML, which may stand between braces."""
    if value is None:
        return "null"
    stream = StringIO()
    round_trip().dump(_styled([value]), stream)
    return stream.getvalue().strip()[1:-1]


def _section(text: str, path: Sequence[str]) -> MappingNode:
    node: Node = round_trip().compose(text)
    for name in path:
        entries = node.value if isinstance(node, MappingNode) else []
        node = {key.value: value for key, value in entries}[name]
    if not isinstance(node, MappingNode):
        raise KeyError(path[-1])
    return node


def _start(text: str, key: Node, node: Node) -> int:
    """Return where a value starts; the mark of an empty one may stand behind comments."""
    start: int = node.start_mark.index
    return text.index(":", key.end_mark.index) + 1 if start == node.end_mark.index else start


def _end(text: str, key: Node, node: Node) -> int:
    """Return where a value ends; the marks of block style stand behind the comments that follow."""
    if isinstance(node, CollectionNode) and not node.flow_style:
        last = node.value[-1]
        return _end(text, *last) if isinstance(last, tuple) else _end(text, key, last)
    if node.start_mark.index == node.end_mark.index:
        return _start(text, key, node)
    return len(text[: node.end_mark.index].rstrip())


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def _inserted(text: str, place: int, more: str) -> str:
    return text[:place] + more + text[place:]


def _styled(value: Any) -> Any:
    """Style a value for ruamel; YAML 1.1 takes 1e-05 for text, and 1.0e-05 for a number."""
    if isinstance(value, list):
        listed = CommentedSeq(map(_styled, value))
        listed.fa.set_flow_style()
        return listed
    if isinstance(value, float) and "." not in repr(value) and "e" in repr(value):
        return round_trip().load(repr(value).replace("e", ".0e"))
    if isinstance(value, str) and not value.isprintable():
        return DoubleQuotedScalarString(value)
    return value
