"""The code of each stage, as fingerprints of the modules that it imports.

DVC's lock file is written anew after every stage, and one line for each module of each stage made
that cost seconds. So each stage depends on one file that lists its modules with their hashes.
"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

import grimp
from grimp.exceptions import SourceSyntaxError

from dlplora.errors import DlpLoraError, one_line

PACKAGES = ("dlplora", "tasks")
# What changes no result: errors, locks, what shows, times and starts, and params, whose values
# are tracked.
_NO_MATTER = {"dlplora.errors", "dlplora.scratch", "dlplora.stage", "dlplora.edge"}
_NO_MATTER_PACKAGES = ("dlplora.params.", "dlplora.warm.")
_TEMPLATE = ".jinja"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def fingerprints(root: Path) -> dict[str, dict[str, str]]:
    """Return for each stage, by name, the fingerprint of each file that it is made of.

    These are the modules that tasks/<stage>.py imports, directly or not, and the templates that
    stand beside them. `root` is the checkout, from which both packages must be importable.

    Raises `DlpLoraError` if a file is not Python.
    """
    try:
        graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    except SourceSyntaxError as error:
        raise DlpLoraError(f"{error.filename}: not Python: line {error.lineno}") from error
    stages = sorted(graph.find_children("tasks"))
    found: dict[str, str] = {}
    told = {}
    for stage in stages:
        modules = {stage} | graph.find_upstream_modules(stage)
        files = sorted({file for module in modules for file in _files(root, module)})
        found |= {file: fingerprint(root / file) for file in files if file not in found}
        told[stage.removeprefix("tasks.")] = {file: found[file] for file in files}
    return told


def _files(root: Path, module: str) -> Iterator[str]:
    """Yield the file of a module that matters, and the templates beside it."""
    if module in _NO_MATTER or f"{module}.".startswith(_NO_MATTER_PACKAGES):
        return
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
        content = ast.unparse(tree).encode()
    return hashlib.sha256(content).hexdigest()
