"""Results of what params.yaml no longer lists, deleted."""

from collections.abc import Iterator
from pathlib import Path

from dlplora.params.load import load_params
from dlplora.params.yaml import read_yaml
from dlplora.project.files import Project
from dlplora.records.files import is_aside, is_being_written, remove


def prune(project: Project) -> list[Path]:
    """Delete what params.yaml no longer lists, once no pipeline runs; return what it was."""
    with project.alone():
        return delete_unlisted(project)


def delete_unlisted(project: Project) -> list[Path]:
    """Delete the results of tasks, routers and systems that params.yaml no longer lists.

    Where results may stand is read from the outputs of dvc.yaml; DVC's cache keeps them, so
    that a task that comes back is restored. What killed runs left half-written goes as well, and
    timings of stages that are gone.
    """
    values = load_params(project.params_file).model_dump()
    listed: set[Path] = set()
    folders: set[Path] = set()
    for template, section in _templates(project.root / "dvc.yaml"):
        folders.add(Path(template).parent)
        for key in values.get(section) or {}:
            out = Path(template.replace("${key}", key))
            listed |= {out, *out.parents}
    unlisted = {
        entry
        for folder in folders
        if (project.root / folder).is_dir()
        for entry in (project.root / folder).iterdir()
        if entry.relative_to(project.root) not in listed
    }
    stages = read_yaml(project.root / "dvc.yaml")["stages"]
    unlisted |= {
        entry for entry in (project.root / "data/timings").glob("*") if entry.stem not in stages
    }
    asides = {path for path in (project.root / "data").rglob(".*") if is_aside(path)}
    pruned = sorted(path for path in unlisted | asides if not is_being_written(path))
    for entry in pruned:
        remove(entry)
    return pruned


def _templates(dvc_yaml: Path) -> Iterator[tuple[str, str]]:
    """Yield each output of dvc.yaml that has a key in it, with the section of the keys."""
    for stage in read_yaml(dvc_yaml)["stages"].values():
        if "foreach" not in stage:
            continue
        section = stage["foreach"].removeprefix("${").removesuffix("}")
        for out in [*stage["do"].get("outs", []), *stage["do"].get("metrics", [])]:
            yield out if isinstance(out, str) else next(iter(out)), section
