"""Commands of the project, run for the pages as a person would type them."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from dlplora.errors import DlpLoraError
from dlplora.project.commands import environment
from dlplora.scratch import SCRATCH, is_held

_SECONDS = 120.0


class Commands:
    """The command line of the project in `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def edit(self, *words: str) -> str:
        """Run a command that edits params.yaml; refused at once while a run is at work there."""
        if is_held("repro", scratch=self._root / SCRATCH):
            raise DlpLoraError(
                "a run is at work in this tree; wait until it has ended, or cancel it (Runs)"
            )
        return self.run(*words)

    def run(self, *words: str) -> str:
        """Run `dlplora WORDS` and return what it printed; `DlpLoraError` has its own line."""
        done = self._run(words)
        if done.returncode:
            told = (done.stderr or done.stdout).strip().splitlines()
            raise DlpLoraError(told[-1].removeprefix("error: ") if told else "the command failed")
        return done.stdout.strip()

    def json(self, *words: str) -> Any:
        """Run `dlplora WORDS --json` and return what it told, also of a file that is no good."""
        done = self._run((*words, "--json"))
        try:
            return json.loads(done.stdout)
        except ValueError:
            told = done.stderr.strip().splitlines() or ["the command told nothing"]
            raise DlpLoraError(told[-1].removeprefix("error: ")) from None

    def _run(self, words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                [sys.executable, "-m", "dlplora.cli", *words],
                cwd=self._root,
                env=environment(self._root),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise DlpLoraError(
                f"`{shown(*words)}` took more than {_SECONDS:.0f} s and was ended"
            ) from error


def shown(*words: str) -> str:
    """Write a command as it is typed; paths lead from the folder of the project."""
    return shlex.join(["dlplora", *words])


def typed_path(file: Path, root: Path) -> str:
    """Write a path as it is typed in the folder of the project; of an upload, its name alone."""
    is_upload = file.is_relative_to((root / SCRATCH).resolve())
    return file.name if is_upload else os.path.relpath(file, root)
