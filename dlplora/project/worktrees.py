"""Git worktrees for runs with other parameters: each on a branch `runs/NAME` of its own.

They stand in `.scratch/runs/` and share with the project DVC's cache, the downloads and the answers
that are kept, so that what a change does not affect is restored. Branch and cache keep the results
of those deleted. A worktree is of the whole repository; the project may be a folder of it.
"""

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from dlplora.errors import DlpLoraError
from dlplora.project.commands import CommandError, dvc, git
from dlplora.project.files import RAW
from dlplora.scratch import ANSWERS, DOWNLOADS, is_held

RETRAIN = "retrain"  # the run in whose worktree models are retrained
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


def tip_of(root: Path, branch: str) -> str | None:
    """Return the last commit of a branch, if there is one."""
    try:
        return git(root, "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}")
    except CommandError:
        return None


def contains(root: Path, tip: str, commit: str) -> bool:
    """Tell whether a commit is another one or an ancestor of it."""
    try:
        git(root, "merge-base", "--is-ancestor", commit, tip)
    except CommandError:
        return False
    return True


def shared_folder(root: Path) -> Path:
    """Return the folder for what all checkouts of a repository share, such as locks."""
    return (root / git(root, "rev-parse", "--git-common-dir")).resolve() / "dlplora"


def refuse_checked_out(root: Path, branches: Collection[str]) -> None:
    """Raise `WorktreeError` if a branch is checked out elsewhere than in retrains' worktrees."""
    for entry in git(root, "worktree", "list", "--porcelain").split("\n\n"):
        place, *more = entry.splitlines()
        folder = Path(place.removeprefix("worktree "))
        for branch in branches:
            is_ours = folder.parts[-3:] == (*_RUNS.parts, RETRAIN)
            if f"branch refs/heads/{branch}" in more and folder.is_dir() and not is_ours:
                raise WorktreeError(
                    f"{folder}: the branch {branch}, which retrains move, is checked out there; "
                    f"switch to a branch of your own"
                )


def uncommitted(root: Path) -> list[str]:
    """List the tracked files that differ from the commit; a worktree does not see the changes."""
    return git(root, "diff", "--relative", "--name-only", "HEAD", "--", ".").splitlines()


def open_worktree(root: Path, name: str, *, start: str = "HEAD", is_ours: bool = False) -> Path:
    """Check out the branch `runs/NAME`, made from a commit, or go on in its worktree.

    Returns the project's folder there. One that `is_ours` is made again if it is broken.
    """
    folder = root / _RUNS / name
    project = folder / prefix(root)
    if is_ours and folder.is_dir() and not _is_whole(project):
        shutil.rmtree(folder)
    branch = f"runs/{name}"
    if not folder.is_dir() or not any(folder.iterdir()):
        git(root, "worktree", "prune")
        is_there = git(root, "branch", "--list", branch)
        place = str(folder.resolve())
        made = [place, branch] if is_there else ["-b", branch, place, start]
        forced = ["--force", "--force"] if is_ours else []  # also if it is known, and locked
        git(root, *_OURS, "worktree", "add", "--quiet", *forced, *made)
    _refuse_others(folder)
    if not (project / "params.yaml").is_file():
        raise WorktreeError(f"{project}: the commit has no params.yaml; commit the project first")
    os.utime(folder)
    for shared in _SHARED:
        _link(project / shared, to=root / shared)
    _share_cache(project, of=root)
    return project


def _is_whole(project: Path) -> bool:
    try:
        _refuse_others(project)
    except (DlpLoraError, OSError):
        return False
    return (project / "params.yaml").is_file()


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
    if git(project, "status", "--porcelain", "."):
        words = ("commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", subject)
        git(project, *_OURS, *author(project), *words)


def reset(project: Path, *, to: str) -> None:
    """Reset a worktree and its branch to a commit; of ignored files only those of raw data go."""
    _refuse_others(project)
    git(project, *_OURS, "reset", "--quiet", "--hard", to)
    git(project, "clean", "--quiet", "--force", "-d")
    git(project, "clean", "--quiet", "--force", "-d", "-x", "--", str(RAW))


def clear_locks(root: Path, branches: Collection[str], *, tags: Collection[str]) -> None:
    """Delete the lock files that a killed git left of these refs and of the retrains' worktree."""
    common = shared_folder(root).parent
    left = [common / "refs/heads" / f"{branch}.lock" for branch in branches]
    left += [lock for tag in tags for lock in (common / "refs/tags").glob(f"{tag}.lock")]
    with suppress(CommandError):  # there is no worktree yet, or it is broken
        own = Path(git(root / _RUNS / RETRAIN, "rev-parse", "--absolute-git-dir"))
        if own.parent == common / "worktrees":
            left += own.glob("*.lock")
    for lock in left:
        lock.unlink(missing_ok=True)


def author(root: Path) -> tuple[str, ...]:
    """Return the words that name an author to git, if it knows of none."""
    try:
        git(root, "config", "user.email")
    except CommandError:
        return ("-c", "user.name=dlplora", "-c", "user.email=dlplora@localhost")
    return ()


def merge(project: Path, commit: str, *, results: Collection[str]) -> None:
    """Merge a commit into a worktree's branch; of `results`, which are made again, ours stay.

    `results` are relative to the project. Raises `WorktreeError` naming the files of the
    repository that both have changed.
    """
    _refuse_others(project)
    silent = ("--quiet", "--no-edit", "--no-verify", "--no-gpg-sign")
    try:
        words = ("merge", *silent, "--ff", "--no-verify-signatures", commit)
        git(project, *_OURS, *author(project), *words)
        return
    except CommandError as error:
        listed = git(project, "diff", "--no-relative", "--name-only", "--diff-filter=U", "-z")
        files = [file for file in listed.split("\0") if file]
        if not files:
            raise WorktreeError(str(error)) from error
    ours = {f"{prefix(project)}{result}" for result in results}
    if left := [file for file in files if file not in ours]:
        git(project, "merge", "--abort")
        raise WorktreeError(
            f"{', '.join(left)}: changed in different ways on the branch production and in your "
            f"commit; run `git merge production`, resolve the conflicts, commit, and try again"
        )
    paths = [f":(top,literal){file}" for file in files]
    git(project, "checkout", "--ours", "--", *paths)
    git(project, "add", "--", *paths)
    git(project, *_OURS, *author(project), "commit", *silent)


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
    """Delete all worktrees of runs but the newest ones and those at work; return their names.

    That of the retrains stays.
    """
    inner = prefix(root)
    folders = [folder for folder in worktrees(root) if folder.name != RETRAIN]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    old = [
        folder
        for folder in folders[keep:]
        if not is_held("repro", scratch=folder / inner / ".scratch")
    ]
    for folder in old:
        git(root, "worktree", "remove", "--force", str(folder.resolve()))
    return [folder.name for folder in old]


def worktrees(root: Path) -> list[Path]:
    """List the worktrees of runs that are there."""
    return [file.parent for file in (root / _RUNS).glob("*/.git") if file.is_file()]


def prefix(root: Path) -> str:
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
    check_out_files(project)


def check_out_files(project: Path) -> None:
    """Check out the files that DVC tracks one by one, as those of raw data."""
    files = sorted((project / "data").rglob("*.dvc"))
    if files:
        dvc(project, "checkout", *[str(file.relative_to(project)) for file in files])
