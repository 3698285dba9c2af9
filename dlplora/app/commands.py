"""Commands of the project, run for the pages as a person would type them."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dlplora.errors import DataError, DlpLoraError
from dlplora.params.fields import is_identifier
from dlplora.project.commands import environment
from dlplora.scratch import SCRATCH, is_held

PASSWORD = "DLPLORA_APP_PASSWORD"  # no command needs it
_SECONDS = 600.0


class Commands:
    """The command line of the project in `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def edit(self, *words: str) -> str:
        """Run a command that edits params.yaml; refused while the tree is at work."""
        self.refuse_at_work()
        return self.run(*words)

    def refuse_at_work(self) -> None:
        """Raise a `DlpLoraError` while a run or another edit is at work in the tree."""
        if is_held("repro", scratch=self._root / SCRATCH):
            raise DlpLoraError(
                "a run or another edit is at work in this tree; try again when it has ended (Runs)"
            )

    def run(self, *words: str) -> str:
        """Run `dlplora WORDS` and return what it printed; `DlpLoraError` has its own line."""
        code, out, errors = self._run(words)
        if code:
            raise DlpLoraError(self._reason(errors or out))
        return out.strip()

    def json(self, command: str, *words: str) -> Any:
        """Run `dlplora COMMAND --json WORDS`; return what it told, also of a file that is bad."""
        _, out, errors = self._run((command, "--json", *words))
        try:
            return json.loads(out)
        except ValueError:
            raise DlpLoraError(self._reason(errors)) from None

    def _reason(self, text: str) -> str:
        """Return the last line that a command said, without the folder of uploads."""
        lines = text.strip().splitlines() or ["the command failed"]
        return _without_folders(lines[-1].removeprefix("error: "), self._root)

    def _run(self, words: Sequence[str]) -> tuple[int, str, str]:
        clean = environment(self._root)
        clean.pop(PASSWORD, None)
        with subprocess.Popen(
            [sys.executable, "-m", "dlplora.cli", *words],
            cwd=self._root,
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                out, errors = process.communicate(timeout=_SECONDS)
            except BaseException as error:
                with suppress(ProcessLookupError):  # what it has started ends with it
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise DlpLoraError(
                        f"`dlplora {words[0]}` took more than {_SECONDS:.0f} s and was ended"
                    ) from error
                raise
        return process.returncode, out, errors


def shown(command: str, *words: str, text: str | None = None) -> str:
    """Write a command as it is typed; `text` is a person's own, whatever it begins with."""
    last = [] if text is None else ["--", text] if text.startswith("-") else [text]
    return shlex.join(["dlplora", command, *words, *last])


def typed_path(file: Path, root: Path) -> str:
    """Write a path as it is typed in the folder of the project; of an upload, its name alone."""
    is_upload = file.is_relative_to((root / SCRATCH).resolve())
    return file.name if is_upload else os.path.relpath(file, root)


def _without_folders(text: str, root: Path) -> str:
    """Name uploads in a message as their owner does."""
    folder = re.escape(str((root / SCRATCH / "app").resolve()))
    return re.sub(rf"{folder}/(?:[^/\s]+/)*([^/\s]+)", r"\1", text)


def task_name(name: str) -> str:
    """Return a name that a task may have; `DataError` on another one."""
    if not is_identifier(name):
        raise DataError(
            f"{name!r} cannot name a task: use a letter, then up to 63 letters, digits or _"
        )
    return name
