"""Raw data of a candidate: what is needed to check it, and imports that are fetched again."""

import logging
from pathlib import Path

from dlplora.errors import DlpLoraError
from dlplora.lifecycle.inbox import check_task
from dlplora.params.load import load_params
from dlplora.project.commands import dvc, git
from dlplora.project.files import Project
from dlplora.project.own_tasks import is_import
from dlplora.project.repro import run_cli

logger = logging.getLogger(__name__)


def fetch_raw(project: Project) -> None:
    """Make what is needed to check raw files: those of sources, and the base model."""
    sources = load_params(project.params_file).sources
    run_cli(project.root, "repro", "base_model", *(f"fetch@{key}" for key in sources))


def has_imports(root: Path, commit: str) -> bool:
    """Tell whether a commit has imported files, which may have changed elsewhere."""
    words = ("ls-tree", "-r", "-z", "--name-only", commit, "--", "data/raw")
    trackers = [name for name in git(root, *words).split("\0") if name.endswith(".dvc")]
    texts = [git(root, "show", f"{commit}:./{name}") for name in trackers]
    return any("\ndeps:" in f"\n{text}" for text in texts)


def update_imports(project: Project) -> None:
    """Fetch imported files again; what there was stays where that fails, or the data is bad."""
    root = project.root
    tasks = load_params(project.params_file).tasks
    trackers = sorted(
        path
        for path in root.glob("data/raw/*/*.dvc")
        if path.parent.name in tasks and is_import(path)
    )
    if trackers:
        fetch_raw(project)
    for tracker in trackers:
        name = str(tracker.relative_to(root))
        try:
            dvc(root, "update", name)
            check_task(project, tracker.parent.name)
        except DlpLoraError as error:
            logger.warning("%s: not updated: %s", name, error)
            git(root, "checkout", "--", name)
            dvc(root, "checkout", "--force", name)
