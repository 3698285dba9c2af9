"""DVC and git as they are started for a project, and what keeps DVC from starting there."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dlplora.edge import cleaned
from dlplora.errors import DlpLoraError

_SHARED_CACHE = Path("/var/tmp/dvc/repo")  # DVC's site cache in Linux: hashes of files, by project
_NO_REASON = "Having any troubles?"


class CommandError(DlpLoraError):
    """Git or DVC could not do what it was asked to; the message is its own reason."""


def dvc(root: Path, *words: str, told: Mapping[str, str] | None = None) -> str:
    """Run DVC on a project, perhaps with more in its environment; return what it printed."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *words]
    return _run(root, command, f"dvc {words[0]}", told or {})


def dvc_of_all_commits(root: Path, *words: str) -> str:
    """Run DVC on other commits of a project by the remotes that it has now, not those of then."""
    return dvc(root, *words, told={"DVC_SYSTEM_CONFIG_DIR": str(root.resolve() / ".dvc")})


def git(root: Path, *words: str) -> str:
    """Run git in a folder; return what it printed."""
    command = next(word for word in words if not word.startswith("-") and "=" not in word)
    return _run(root, ["git", *words], f"git {command}", {})


def _run(root: Path, words: Sequence[str], title: str, told: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            words,
            cwd=root,
            env={**environment(root), "PYTHONIOENCODING": "utf-8:backslashreplace", **told},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise CommandError(f"{title}: {error}") from error
    if done.returncode:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines()]
        reason = " ".join(" ".join(line for line in lines if _NO_REASON not in line).split())
        raise CommandError(f"{title}: {reason or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def environment(root: Path) -> dict[str, str]:
    """Return what DVC's environment has to be: stages run `python -m …`, and so this interpreter.

    Nothing of the surroundings leads it to another repository, code or way to write.
    """
    clean = cleaned(os.environ)
    clean["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), clean.get("PATH", os.defpath)]
    )
    clean["DVC_NO_ANALYTICS"] = "1"
    if (cache := own_site_cache(root)) is not None:
        clean.setdefault("DVC_SITE_CACHE_DIR", str(cache))
    return clean


def own_site_cache(root: Path) -> Path | None:
    """Return where DVC keeps its site cache if another user's stands where it keeps it else."""
    there = next(folder for folder in (_SHARED_CACHE, *_SHARED_CACHE.parents) if folder.exists())
    return None if os.access(there, os.W_OK | os.X_OK) else root.resolve() / ".scratch/dvc"


def prepare(root: Path) -> None:
    """Clear what a crash has left in DVC's way, within the project's lock.

    Raises `CommandError` if DVC cannot work here at all.
    """
    folder = root.resolve()
    if not any((parent / ".git").exists() for parent in (folder, *folder.parents)) and (
        not _is_without_git(root)
    ):
        raise CommandError(
            f"{folder}: in no git repository, which DVC asks for; run `git init`, or do without: "
            f"`dvc config --local core.no_scm true`"
        )
    _clear_broken_rwlock(folder / ".dvc/tmp")


def _is_without_git(root: Path) -> bool:
    """Tell whether DVC is set up to do without git."""
    try:
        return dvc(root, "config", "core.no_scm").lower() == "true"
    except CommandError:  # not set
        return False


def _clear_broken_rwlock(folder: Path) -> None:
    """Delete DVC's list of who reads and writes what if it is cut off, unless DVC is at it."""
    file = folder / "rwlock"
    if not file.is_file():
        return
    with (folder / "rwlock.lock").open("a") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            json.loads(file.read_bytes())
        except (BlockingIOError, FileNotFoundError):
            return
        except ValueError:
            file.unlink()
