"""Suites: sections of params.yaml that are replaced together, the user's own tasks kept."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml.comments import CommentedMap

from dlplora.errors import ParamsError, choices
from dlplora.params.yaml import parse_yaml, read_yaml
from dlplora.project.files import Project, dump, plain, round_trip
from dlplora.project.own_tasks import enlist, is_own


def suite_names(project: Project) -> list[str]:
    """List the suites of a project: the files of suites/ that have a section `tasks`."""
    files = (project.root / "suites").glob("*.yaml")
    return sorted(
        file.stem for file in files if re.search(r"(?m)^tasks:", file.read_text(encoding="utf-8"))
    )


def suite_of(project: Project) -> str:
    """Name the suite that params.yaml holds: the nearest one, edited if it is not that."""
    params, names = project.read(), suite_names(project)
    if not names:
        return "none"
    sections = list(read_yaml(_file(project, names[0])))
    nearest, changed = _nearest(project, params, sections)
    return f"{nearest}, edited" if changed else nearest


def use_suite(project: Project, name: str, *, force: bool) -> list[str]:
    """Replace the sections of params.yaml that a suite holds; return the own tasks kept.

    Tasks of the user's own files stay. Raises `ParamsError` if other edits of those sections
    would be lost, unless `force`.
    """
    if name not in suite_names(project):
        raise ParamsError(f"no suite {name!r}; there are: {choices(suite_names(project))}")
    params = project.read()
    suite = _file(project, name).read_text(encoding="utf-8")
    sections = list(parse_yaml(suite, str(_file(project, name))))
    if not force:
        _refuse_lost_edits(project, params, sections)
    own = {key: task for key, task in params["tasks"].items() if is_own(task)}
    values = round_trip().load(_header(project, sections) + suite)
    if taken := sorted(set(own) & set(values["tasks"])):
        raise ParamsError(
            f"suite {name} has a task {taken[0]}, and so have you; remove yours first"
        )
    for key, task in own.items():
        section = "imported_adapters" if key in params["imported_adapters"] else "adapters"
        enlist(values, key, task, section, params[section].get(key, CommentedMap()))
    project.write(dump(values) if own else _header(project, sections) + suite)
    return sorted(own)


def _file(project: Project, name: str) -> Path:
    return project.root / "suites" / f"{name}.yaml"


def _refuse_lost_edits(project: Project, params: Mapping[str, Any], sections: list[str]) -> None:
    """Raise unless the suite's sections, own tasks aside, are those of some suite."""
    nearest, changed = _nearest(project, params, sections)
    if changed:
        raise ParamsError(
            f"params.yaml: {', '.join(changed)} were edited since suite {nearest}; "
            f"keep a copy and add --force to lose the edits"
        )


def _nearest(
    project: Project, params: Mapping[str, Any], sections: list[str]
) -> tuple[str, list[str]]:
    """Return the suite that the params, own tasks aside, come nearest, and what differs."""
    now = {section: plain(params[section]) for section in sections}
    own = [key for key, task in now["tasks"].items() if is_own(task)]
    for key in own:
        now["tasks"].pop(key)
        now["adapters"].pop(key, None)
        now["imported_adapters"].pop(key, None)
        now["indexes"].pop(key, None)
    for cluster in now["experts"].values():
        cluster["tasks"] = [task for task in cluster["tasks"] if task not in own]
    suites = {name: read_yaml(_file(project, name)) for name in suite_names(project)}
    changed = {
        name: [section for section in sections if suite.get(section) != now[section]]
        for name, suite in suites.items()
    }
    nearest = min(changed, key=lambda name: len(changed[name]))
    return nearest, changed[nearest]


def _header(project: Project, sections: list[str]) -> str:
    """Return params.yaml up to the first section of a suite and the comment above it."""
    lines = project.params_file.read_text(encoding="utf-8").splitlines(keepends=True)
    first = next(place for place, line in enumerate(lines) if line.partition(":")[0] in sections)
    while first and lines[first - 1].startswith("#"):
        first -= 1
    later = {line.partition(":")[0] for line in lines[first:] if re.match(r"\w+:", line)}
    if mixed := sorted(later - set(sections)):
        raise ParamsError(f"params.yaml: move {mixed[0]} above the section {sections[0]}")
    return "".join(lines[:first])
