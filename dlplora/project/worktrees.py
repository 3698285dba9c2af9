"""Git worktrees for runs with other parameters: each on a branch `runs/NAME` of its own.

They stand in `.scratch/runs/` and share with the project DVC's cache, the downloads and the answers
that are kept, so that what a change does not affect is restored. Branch and cache keep the results
of those deleted. A worktree is of the whole repository; the project may be a folder of it.
"""

import os
from pathlib import Path

from dlplora.errors import DlpLoraError
from dlplora.project.commands import CommandError, dvc, git
from dlplora.scratch import ANSWERS, DOWNLOADS, is_held

_RUNS = Path(".scratch/runs")
_SHARED = (DOWNLOADS, ANSWERS)
_OURS = ("-c", "core.hooksPath=/dev/null")  # a user's hooks are for a user's commits


class WorktreeError(DlpLoraError):
    """A run in a worktree cannot begin, or would touch what is not its own."""


def commit_of(root: Path) -> str:
    """Return the commit that is checked out."""
    try:
        return git(root, "rev-parse", "--verify", "HEAD")
    except CommandError as error:
        raise WorktreeError(
            f"{root.resolve()}: a run in a worktree begins with the commit of a git repository, "
            f"and there is none: {str(error).removeprefix('git rev-parse: ')}"
        ) from error


def uncommitted(root: Path) -> list[str]:
    """List the tracked files that differ from the commit; a worktree does not see the changes."""
    return git(root, "diff", "--relative", "--name-only", "HEAD", "--", ".").splitlines()


def open_worktree(root: Path, name: str) -> Path:
    """Check out the branch `runs/NAME`, made from the commit here, or go on in its worktree.

    Returns the project's folder there.
    """
    folder = root / _RUNS / name
    project = folder / _prefix(root)
    branch = f"runs/{name}"
    if not folder.is_dir() or not any(folder.iterdir()):
        git(root, "worktree", "prune")
        is_there = git(root, "branch", "--list", branch)
        place = str(folder.resolve())
        made = [place, branch] if is_there else ["-b", branch, place, "HEAD"]
        git(root, *_OURS, "worktree", "add", "--quiet", *made)
    _refuse_others(folder)
    if not (project / "params.yaml").is_file():
        raise WorktreeError(f"{project}: the commit has no params.yaml; commit the project first")
    os.utime(folder)
    for shared in _SHARED:
        _link(project / shared, to=root / shared)
    _share_cache(project, of=root)
    return project


def _link(place: Path, *, to: Path) -> None:
    """Make a folder that stands elsewhere appear at a place, unless there is one already."""
    try:
        to.mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(exist_ok=True)
        if place.is_symlink() and not place.exists():  # the project was moved
            place.unlink()
        if not place.exists():
            place.symlink_to(to.resolve(), target_is_directory=True)
    except OSError as error:
        raise WorktreeError(f"{place}: cannot be a link to {to}: {error.strerror}") from error


def commit_all(project: Path, subject: str) -> None:
    """Commit all changes of a project in a worktree, if there are any.

    Raises `WorktreeError` unless it is a worktree of its own, on its branch `runs/NAME`.
    """
    _refuse_others(project)
    git(project, "add", "--all", ".")
    if not git(project, "status", "--porcelain", "."):
        return
    author: tuple[str, ...] = ()
    try:
        git(project, "config", "user.email")
    except CommandError:  # there is none
        author = ("-c", "user.name=dlplora", "-c", "user.email=dlplora@localhost")
    words = ("commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", subject)
    git(project, *_OURS, *author, *words)


def _refuse_others(project: Path) -> None:
    """Raise unless a folder is of a linked worktree on its branch `runs/NAME`: no user's own."""
    top = Path(git(project, "rev-parse", "--show-toplevel"))
    branch = git(project, "branch", "--show-current")
    own, shared = git(project, "rev-parse", "--git-dir", "--git-common-dir").splitlines()
    is_linked = (project / own).resolve() != (project / shared).resolve()
    if not (is_linked and branch == f"runs/{top.name}" and top.parent.name == _RUNS.name):
        raise WorktreeError(
            f"{project}: expected a worktree on its branch runs/…, found a folder of {top} "
            f"on {branch or 'no branch'}; move it away"
        )


def delete_old(root: Path, *, keep: int) -> list[str]:
    """Delete all worktrees of runs but the newest ones and those at work; return their names."""
    runs, prefix = root / _RUNS, _prefix(root)
    folders = [git_file.parent for git_file in runs.glob("*/.git") if git_file.is_file()]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    old = [
        folder
        for folder in folders[keep:]
        if not is_held("repro", scratch=folder / prefix / ".scratch")
    ]
    for folder in old:
        git(root, "worktree", "remove", "--force", str(folder.resolve()))
    return [folder.name for folder in old]


def _prefix(root: Path) -> str:
    """Return where in its repository the project stands; it is empty for the repository itself."""
    return git(root, "rev-parse", "--show-prefix")


def _share_cache(project: Path, *, of: Path) -> None:
    """Let a project in a worktree share DVC's cache, and check out the files tracked there."""
    settings = project / ".dvc/config.local"
    if git(of, "rev-parse", "--show-superproject-working-tree") and not settings.exists():
        # DVC 3.67 takes git's own folder for the files' if a worktree is a submodule's.
        settings.write_text("[core]\n    no_scm = true\n", encoding="utf-8")
    cache = dvc(of, "cache", "dir")
    dvc(project, "cache", "dir", "--local", str((of / cache).resolve()))
    files = sorted((project / "data").rglob("*.dvc"))
    if files:
        dvc(project, "checkout", *[str(file.relative_to(project)) for file in files])
