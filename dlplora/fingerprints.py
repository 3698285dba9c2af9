"""The code of each stage: fingerprints of its modules, and the versions of its libraries.

DVC's lock file is written anew after every stage, and one line for each module of each stage made
that cost seconds. So each stage depends on one file that lists them.
"""

import ast
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dlplora.errors import DlpLoraError, one_line
from dlplora.libraries import CONSTRAINTS, check_installed, pinned_versions
from dlplora.records.files import read_json, record_of

PACKAGES = ("dlplora", "tasks")
# What changes no result: errors, locks, what shows, times, checks and starts, and the sections of
# params, whose values are tracked.
_NO_MATTER = {
    "dlplora.errors",
    "dlplora.scratch",
    "dlplora.stage",
    "dlplora.edge",
    "dlplora.libraries",
    "dlplora.fingerprints",
}
_NO_MATTER_PACKAGES = ("dlplora.params.", "dlplora.warm.")
# The logic between sections of params is tracked by nothing else.
_LOGIC = {"dlplora.params.overrides", "dlplora.params.names"}
_TEMPLATE = ".jinja"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class StageCode:
    """What a stage is made of: files by their fingerprints, libraries by their pinned versions."""

    files: dict[str, str]
    libraries: dict[str, str]


def stage_codes(root: Path) -> dict[str, StageCode]:
    """Return for each stage, by name, what it is made of.

    The files are the modules that tasks/<stage>.py imports, directly or not, and the templates
    beside them; the libraries are those that these modules import. `root` is the checkout, from
    which both packages must be importable.

    Raises `DlpLoraError` if a file is not Python, or if no version of a library is pinned.
    """
    import grimp
    from grimp.exceptions import SourceSyntaxError

    try:
        graph = grimp.build_graph(*PACKAGES, cache_dir=None, include_external_packages=True)
    except SourceSyntaxError as error:
        raise DlpLoraError(f"{error.filename}: not Python: line {error.lineno}") from error
    for logic in _LOGIC:
        for module in graph.find_modules_that_directly_import(logic):
            if f"{module}.".startswith(_NO_MATTER_PACKAGES):  # checks the file, for every stage
                graph.remove_import(importer=module, imported=logic)
    found: dict[str, str] = {}
    codes = {}
    for stage in sorted(graph.find_children("tasks")):
        upstream = {stage} | graph.find_upstream_modules(stage)
        modules = {module for module in upstream if _matters(module)}
        files = sorted({file for module in modules for file in _files(root, module)})
        found |= {file: fingerprint(root / file) for file in files if file not in found}
        imported = {
            package
            for module in modules
            for package in graph.find_modules_directly_imported_by(module)
            if graph.is_module_squashed(package) and package not in sys.stdlib_module_names
        }
        codes[stage.removeprefix("tasks.")] = StageCode(
            {file: found[file] for file in files}, pinned_versions(imported, root / CONSTRAINTS)
        )
    return codes


def check_code(file: Path, root: Path) -> None:
    """Raise `DlpLoraError` if a stage's code or libraries are not those that its file tells.

    Code is compared if it is newer than the file: it may have been edited while a pipeline runs.
    Without the file there is nothing to compare.
    """
    if not file.is_file():
        return
    try:
        code = record_of(StageCode, read_json(file))
    except ValidationError as error:
        raise DlpLoraError(f"{file}: of another version; run `dvc repro code` first") from error
    told = file.stat().st_mtime_ns
    for name, known in code.files.items():
        path = root / name
        if not path.is_file() or (path.stat().st_mtime_ns > told and fingerprint(path) != known):
            raise DlpLoraError(
                f"{path}: changed since the stage `code` ran; run `make repro` again"
            )
    check_installed(code.libraries)


def _matters(module: str) -> bool:
    return module in _LOGIC or (
        module.startswith(tuple(f"{package}." for package in PACKAGES))
        and module not in _NO_MATTER
        and not f"{module}.".startswith(_NO_MATTER_PACKAGES)
    )


def _files(root: Path, module: str) -> Iterator[str]:
    """Yield the file of a module, and the templates beside it."""
    path = Path(*module.split("."))
    file = path.with_suffix(".py")
    if not (root / file).is_file():
        return  # a package: what it holds is imported by its own name
    yield file.as_posix()
    for template in (root / file).parent.glob(f"*{_TEMPLATE}"):
        yield template.relative_to(root).as_posix()


def fingerprint(file: Path) -> str:
    """Hash a file; of Python what it does: comments, docstrings and layout count for nothing.

    Raises `DlpLoraError` if it is not Python.
    """
    content = file.read_bytes()
    if file.suffix == ".py":
        try:
            tree = ast.parse(content, file.name)
        except SyntaxError as error:
            raise DlpLoraError(f"{file}: not Python: {one_line(error)}") from error
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body[0] = ast.Pass()
        content = ascii(_plain(tree)).encode()
    return hashlib.sha256(content).hexdigest()


def _plain(value: object) -> object:
    """Return a syntax tree as class names and fields, the same under every Python.

    They differ in fields that are empty, and in empty texts within an f-string.
    """
    if isinstance(value, ast.JoinedStr):
        parts = [part for part in value.values if getattr(part, "value", None) != ""]
        return "JoinedStr", [_plain(part) for part in parts]
    if isinstance(value, ast.AST):
        fields = [(name, _plain(part)) for name, part in ast.iter_fields(value)]
        return type(value).__name__, [row for row in fields if row[1] not in (None, [])]
    return [_plain(part) for part in value] if isinstance(value, list) else value
