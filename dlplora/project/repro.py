"""`dvc repro`, one at a time in a project."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dlplora.params import load_params
from dlplora.project.files import Project
from dlplora.project.pruning import delete_unlisted
from dlplora.scratch import take_lock


def repro(project: Project, words: Sequence[str]) -> NoReturn:
    """Prune, then become `dvc repro` with these words; a second one waits for the first.

    The process itself turns into DVC and keeps the lock, so that the lock lasts exactly as long
    as DVC does. Stages run `python -m …`: this interpreter's folder stands first in PATH.
    """
    load_params(project.params_file)  # outside a project nothing is written, no lock either
    handle = take_lock("repro", scratch=project.scratch)
    delete_unlisted(project)
    os.set_inheritable(handle, True)
    os.chdir(project.root)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = [sys.executable, "-m", "dvc", "repro", *words]
    os.execve(command[0], command, os.environ | {"PATH": path})
