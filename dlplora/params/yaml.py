"""YAML by the rules that DVC reads it by: of version 1.2, where `no` and `on` are words."""

import re
from io import StringIO
from pathlib import Path
from typing import Any

from dlplora.errors import ParamsError


def read_yaml(file: Path) -> Any:
    """Read a YAML file; raises `ParamsError` if it cannot be read, but `FileNotFoundError` too."""
    try:
        return parse_yaml(file.read_text(encoding="utf-8"), str(file))
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{file}: {' '.join(str(error).split())}") from error


def dump_yaml(values: dict[str, Any]) -> str:
    """Return plain values as YAML."""
    from ruamel.yaml import YAML

    writer, stream = YAML(), StringIO()
    writer.dump(values, stream)
    return stream.getvalue()


def parse_yaml(text: str, source: str) -> Any:
    """Parse a text of YAML; `source` names it in errors. Raises `ParamsError` if it is none."""
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe").load(text)
    except DuplicateKeyError as error:
        key = " ".join(re.sub(r'(?s).*duplicate key "(.*?)".*', r"\1", error.problem).split())
        line = error.problem_mark.line + 1
        raise ParamsError(f"{source}, line {line}: {key} stands twice") from error
    except (YAMLError, ValueError) as error:  # ValueError: of a date that is none
        raise ParamsError(f"{source}: {' '.join(str(error).split())}") from error
