"""What DVC's cache keeps, and what goes to and comes from the remotes of DVC and git."""

import os
import re
from contextlib import ExitStack
from pathlib import Path

from dlplora.lifecycle.registry import BRANCH, Registry
from dlplora.project.commands import dvc, dvc_of_all_commits, git
from dlplora.project.worktrees import RETRAIN, WorktreeError, prefix, shared_folder
from dlplora.scratch import alone, is_held

_REMOVING = re.compile(r"(?m)^Removing (.+)$")
_TAGS = ("refs/tags/model@*:refs/tags/model@*", "refs/tags/model#*:refs/tags/model#*")


def unused_bytes(root: Path) -> tuple[int, int]:
    """Count the cached files that nothing needs, and their bytes.

    Needed is what tags, branches, the workspace and every worktree name.
    """
    paths = _REMOVING.findall(_gc(root, "--dry"))
    return len(paths), sum(os.stat(path).st_size for path in paths)


def delete_unused(root: Path) -> None:
    """Delete the cached files that nothing needs, and checkouts of models not in production."""
    _gc(root, "--force")
    Registry(root).delete_old()


def _gc(root: Path, word: str) -> str:
    others = [folder for folder in _projects(root) if folder.resolve() != root.resolve()]
    locks = [(RETRAIN, root, shared_folder(root))]
    locks += [("repro", folder, folder / ".scratch") for folder in (root, *others)]
    with ExitStack() as stack:
        for name, folder, scratch in locks:
            if is_held(name, scratch=scratch):
                raise WorktreeError(f"{folder}: a run is at work there; wait until it has ended")
            stack.enter_context(alone(name, scratch=scratch))
        projects = [part for folder in others for part in ("--projects", str(folder))]
        return dvc(root, "gc", "--workspace", "--all-branches", "--all-tags", *projects, word)


def _projects(root: Path) -> list[Path]:
    """List the project's folders in all worktrees of its repository."""
    inner = prefix(root)
    lines = git(root, "worktree", "list", "--porcelain").splitlines()
    tops = [Path(line.removeprefix("worktree ")) for line in lines if line.startswith("worktree ")]
    return [top / inner for top in tops if (top / inner / "dvc.yaml").is_file()]


def push(root: Path) -> str | None:
    """Send results, the run-cache and all versions to the remotes; return git's, if it has one."""
    dvc_of_all_commits(root, "push", "--run-cache", "--all-branches", "--all-tags")
    remote = _remote(root)
    if remote is not None:
        is_there = git(root, "branch", "--list", BRANCH)
        branches = [f"refs/heads/{BRANCH}:refs/heads/{BRANCH}"] if is_there else []
        git(root, "push", "--atomic", remote, *branches, *_TAGS)
    return remote


def pull(root: Path) -> str | None:
    """Fetch what `push` sent, and check out the version in production; return git's remote.

    A retrain is waited for.
    """
    remote = _remote(root)
    with alone(RETRAIN, scratch=shared_folder(root)):
        if remote is not None:
            is_there = git(root, "ls-remote", "--heads", remote, f"refs/heads/{BRANCH}")
            branches = [f"refs/heads/{BRANCH}:refs/heads/{BRANCH}"] if is_there else []
            git(root, "fetch", remote, *branches, *_TAGS)
        dvc_of_all_commits(root, "fetch", "--run-cache", "--all-branches", "--all-tags")
        dvc(root, "checkout")
        Registry(root).current()
    return remote


def _remote(root: Path) -> str | None:
    """Return the remote of git to use: origin, else the first one."""
    remotes = git(root, "remote").splitlines()
    return "origin" if "origin" in remotes else next(iter(remotes), None)
