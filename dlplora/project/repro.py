"""`dvc repro`, one at a time in a project."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dlplora.params import load_params
from dlplora.project.files import Project
from dlplora.project.pruning import delete_unlisted
from dlplora.scratch import take_lock


def repro(project: Project, words: Sequence[str]) -> None:
    """Prune, then become `dvc repro` with these words; a second one waits for the first.

    Returns if all is up to date, which `dvc status` tells in half the time; it takes targets
    otherwise than `dvc repro` does, and is not asked about them. Else the process itself turns
    into DVC and keeps the lock, so that the lock lasts exactly as long as DVC does. Stages run
    `python -m …`: this interpreter's folder stands first in PATH.
    """
    load_params(project.params_file)  # outside a project nothing is written, no lock either
    handle = take_lock("repro", scratch=project.scratch)
    delete_unlisted(project)
    os.set_inheritable(handle, True)
    os.chdir(project.root)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    dvc, environment = [sys.executable, "-m", "dvc"], os.environ | {"PATH": path}
    status = [*dvc, "status", "--quiet"]
    if not words and subprocess.run(status, env=environment, check=False).returncode == 0:
        return
    os.execve(dvc[0], [*dvc, "repro", *words], environment)
