"""Git worktrees for runs with other parameters: each on a branch `runs/NAME` of its own.

They stand in `.scratch/runs/` and share DVC's cache and the downloads with the project, so that
what a change does not affect is restored. Branch and cache keep the results of those deleted.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dlplora.errors import DlpLoraError
from dlplora.scratch import is_held

_RUNS = Path(".scratch/runs")
_DOWNLOADS = Path(".scratch/downloads")


class WorktreeError(DlpLoraError):
    """Git or DVC could not do what a run in a worktree needs."""


def commit_of(root: Path) -> str:
    """Return the commit that is checked out."""
    return _git(root, "rev-parse", "HEAD")


def uncommitted(root: Path) -> list[str]:
    """List the tracked files that differ from the commit; a worktree does not see the changes."""
    return _git(root, "diff", "--name-only", "HEAD").splitlines()


def open_worktree(root: Path, name: str) -> Path:
    """Check out the branch `runs/NAME`, made from the commit here, or go on in its worktree."""
    folder = root / _RUNS / name
    branch = f"runs/{name}"
    if not folder.is_dir():
        _git(root, "worktree", "prune")
        is_there = _git(root, "branch", "--list", branch)
        made = [str(folder), branch] if is_there else ["-b", branch, str(folder), "HEAD"]
        _git(root, "worktree", "add", "--quiet", *made)
    os.utime(folder)
    downloads = folder / _DOWNLOADS
    downloads.parent.mkdir(exist_ok=True)
    (root / _DOWNLOADS).mkdir(parents=True, exist_ok=True)
    if not downloads.exists():
        downloads.symlink_to(root / _DOWNLOADS, target_is_directory=True)
    _share_cache(folder, of=root)
    return folder


def commit_all(worktree: Path, subject: str) -> None:
    """Commit all changes in a worktree, if there are any."""
    _git(worktree, "add", "--all")
    if not _git(worktree, "status", "--porcelain"):
        return
    known = subprocess.run(["git", "config", "user.email"], cwd=worktree, capture_output=True)
    author = [] if known.returncode == 0 else ["user.name=dlplora", "user.email=dlplora@localhost"]
    named = [word for setting in author for word in ("-c", setting)]
    _git(worktree, *named, "commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", subject)


def delete_old(root: Path, *, keep: int) -> list[str]:
    """Delete all worktrees of runs but the newest ones and those at work; return their names."""
    runs = root / _RUNS
    folders = [folder for folder in runs.iterdir() if folder.is_dir()] if runs.is_dir() else []
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    old = [folder for folder in folders[keep:] if not is_held("repro", scratch=folder / ".scratch")]
    for folder in old:
        _git(root, "worktree", "remove", "--force", str(folder))
    return [folder.name for folder in old]


def _share_cache(worktree: Path, *, of: Path) -> None:
    """Let a worktree share DVC's cache, and check out the files tracked there."""
    cache = _dvc(of, "cache", "dir")
    _dvc(worktree, "cache", "dir", "--local", str(of / cache))
    files = sorted((worktree / "data").rglob("*.dvc"))
    if files:
        _dvc(worktree, "checkout", *[str(file.relative_to(worktree)) for file in files])


def _dvc(root: Path, *words: str) -> str:
    return _told(root, [sys.executable, "-m", "dvc", "--wait-for-lock", *words], f"dvc {words[0]}")


def _git(root: Path, *words: str) -> str:
    return _told(root, ["git", *words], f"git {words[0]}")


def _told(root: Path, words: Sequence[str], title: str) -> str:
    """Run a command to its end; return what it printed."""
    done = subprocess.run(
        words, cwd=root, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines()]
        raise WorktreeError(f"{title}: {' '.join(' '.join(lines).split())}")
    return done.stdout.strip()
