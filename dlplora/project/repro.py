"""`dvc repro`, one at a time in a project; another suite in a worktree of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dlplora import warm
from dlplora.errors import DlpLoraError
from dlplora.params.load import load_params
from dlplora.project.commands import environment, prepare
from dlplora.project.files import Project
from dlplora.project.pruning import delete_unlisted
from dlplora.project.suites import use_suite
from dlplora.project.worktrees import commit_all, commit_of, delete_old, open_worktree, uncommitted
from dlplora.scratch import take_lock

logger = logging.getLogger(__name__)


def repro(project: Project, words: Sequence[str]) -> None:
    """Prune, then become `dvc repro` with these words; a second one waits for the first.

    Returns if all is up to date, which `dvc status` tells in half the time; it takes targets
    otherwise than `dvc repro` does, and is not asked about them. Else the process itself turns
    into DVC and keeps the lock, so that the lock lasts exactly as long as DVC does.
    """
    load_params(project.params_file)  # outside a project nothing is written, no lock either
    handle = take_lock("repro", scratch=project.scratch)
    delete_unlisted(project)
    project.make_raw_folders()
    prepare(project.root)
    os.set_inheritable(handle, True)
    told = environment(project.root)
    os.chdir(project.root)
    dvc = [sys.executable, "-m", "dvc"]
    status = [*dvc, "status", "--quiet"]
    if not words and subprocess.run(status, env=told, check=False).returncode == 0:
        return
    with warm.server_for(Path()) as more:
        os.execve(dvc[0], [*dvc, "repro", *words], told | more)


def repro_suite(project: Project, suite: str) -> Path:
    """Bring a suite up to date in a worktree of the commit that is checked out; return its folder.

    The project's own files stay as they are; the worktree shares its cache, and the branch
    `runs/…` keeps dvc.lock and the metrics. Raises `DlpLoraError` if the pipeline fails.
    """
    name = f"{suite}-{commit_of(project.root)[:8]}"
    for changed in uncommitted(project.root):
        logger.warning("%s: its uncommitted changes are not part of this run", changed)
    folder = open_worktree(project.root, name)
    use_suite(Project(folder), suite, force=True)
    commit_all(folder, f"Use the suite {suite}")
    run_repro(folder)
    commit_all(folder, f"Keep the results of the suite {suite}")
    delete_old(project.root, keep=load_params(project.params_file).flow.keep_runs)
    return folder


def run_repro(folder: Path) -> None:
    """Bring another working tree up to date; raises `DlpLoraError` if it fails."""
    run_cli(folder, "repro")


def run_cli(folder: Path, *words: str) -> None:
    """Run a command of a folder's own code there; raises `DlpLoraError` if it fails."""
    command = [sys.executable, "-m", "dlplora.cli", *words]
    done = subprocess.run(command, cwd=folder, env=environment(folder), check=False)
    if code := done.returncode:
        raise DlpLoraError(f"{folder}: `dlplora {words[0]}` ended with exit code {code}")
