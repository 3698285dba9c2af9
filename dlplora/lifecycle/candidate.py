"""The candidate of a retrain: the branch `runs/retrain` in a worktree of its own.

It is `production` merged with the commit that is checked out here, and the files of the inbox. An
interrupted one starts over with the files that it had taken; what it computed is in the cache.
"""

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from dlplora.lifecycle import inbox
from dlplora.lifecycle.raw_data import fetch_raw, has_imports, update_imports
from dlplora.lifecycle.registry import BRANCH, CARD
from dlplora.params.yaml import read_yaml
from dlplora.project.commands import git
from dlplora.project.files import Project
from dlplora.project.worktrees import (
    RETRAIN,
    WorktreeError,
    check_out_files,
    clear_locks,
    commit_all,
    commit_of,
    contains,
    merge,
    open_worktree,
    prefix,
    refuse_checked_out,
    reset,
    shared_folder,
    tip_of,
    uncommitted,
)
from dlplora.records.files import file_sha256, read_json, write_json
from dlplora.scratch import alone

logger = logging.getLogger(__name__)
_BRANCH = f"runs/{RETRAIN}"
_RESULTS = ("dvc.lock", "data/metrics.json", str(CARD))  # made again: no inputs


class Candidate:
    """What a retrain trains and judges. `project` is its folder once it is open.

    Raises `WorktreeError` if there is no commit, or if its branch or `production` is checked out.
    """

    project: Project

    def __init__(self, root: Path) -> None:
        self._root = root
        self._head = commit_of(root)
        self._taken = shared_folder(root) / "taken.json"
        refuse_checked_out(root, (BRANCH, _BRANCH))
        self._check_production()
        clear_locks(root, (_BRANCH, BRANCH), tags=("model@v*", "model#production#*"))
        inbox.warn_of_links(root)
        for changed in uncommitted(root):
            logger.warning(
                "%s: its uncommitted changes are not part of this retrain, which starts from the "
                "last commit",
                changed,
            )

    def _check_production(self) -> None:
        """Raise `WorktreeError` if `production` is the user's own branch."""
        if self._production and not git(self._root, "ls-tree", self._production, "--", str(CARD)):
            raise WorktreeError(
                f"the branch {BRANCH} has no {CARD} and was made by no retrain; rename it"
            )

    @property
    def _production(self) -> str | None:
        return tip_of(self._root, BRANCH)

    def tip(self) -> str | None:
        """Return the candidate's last commit."""
        return tip_of(self._root, _BRANCH)

    def may_have_news(self) -> bool:
        """Tell whether anything may differ from what `production` was made of."""
        production = self._production
        return (
            production is None
            or bool(self.taken())
            or bool(inbox.files_in(self._root))
            or has_imports(self._root, production)
            or not contains(self._root, production, self._head)
        )

    def begin(self) -> None:
        """Check out `production`, and merge what is checked out here.

        Raises `WorktreeError` naming the files that both have changed.
        """
        start = self._production or self._head
        if self.taken():
            logger.info("the last retrain was interrupted: its files are taken again")
        folder = open_worktree(self._root, RETRAIN, start=start, is_ours=True)
        with alone("repro", scratch=folder / ".scratch"):  # what a killed one left running ends
            reset(folder, to=start)
        merge(folder, self._head, results=_RESULTS)
        check_out_files(folder)
        self.project = Project(folder)
        self.project.make_raw_folders()
        commit_all(folder, "Add the folders of tasks")

    def take_inbox(self) -> None:
        """Take the files of the inbox in: copied, tracked and committed, and only then moved."""
        places = {path: path for path in self.taken()}  # by one that was interrupted
        if places or inbox.files_in(self._root):
            fetch_raw(self.project)
        folder = inbox.taken_folder(self._root)
        places |= {path: folder / path.name for path in inbox.settled(inbox.files_in(self._root))}
        taken = {file: digest for file in places if (digest := self._take(file))}
        self._remember(places[file] for file in taken)
        if taken:
            names = ", ".join(file.name for file in taken)
            commit_all(self.project.root, f"Take {names} from the inbox")
        for file, digest in taken.items():
            if file != places[file]:
                _move(file, places[file], sha256=digest)

    def _take(self, file: Path) -> str | None:
        """Take a file in, or refuse it; return the hash of what was taken.

        One that vanishes, or that may not be moved, is left out.
        """
        try:
            file.stat()
            arrival = inbox.check(self.project, file)
            if arrival.problem is not None:
                refused = inbox.refuse(file, arrival.problem)
                logger.warning("%s: refused: %s", refused, arrival.problem)
                return None
            digest = file_sha256(file)
            if not inbox.is_taken(self.project, file.stem, digest):
                inbox.take(self.project, file, digest)
                logger.info("%s: %d new questions of %s", file, arrival.num_new, arrival.task)
        except (FileNotFoundError, PermissionError) as error:
            logger.warning("%s: left out: %s", file, error.strerror)
            return None
        return digest

    def taken(self) -> list[Path]:
        """List the files taken from an inbox that are neither accepted nor refused yet."""
        names = read_json(self._taken) if self._taken.is_file() else []
        files = [Path(os.path.relpath(self._taken.parent / name)) for name in names]
        return [file for file in files if file.is_file()]

    def _remember(self, files: Iterable[Path]) -> None:
        """Record where the taken files stand, or will: in this checkout's inbox or in another's."""
        names = [os.path.relpath(file, self._taken.parent) for file in files]
        write_json(self._taken, names)

    def refuse(self, reason: str) -> None:
        """Refuse the files that were taken, and go back to `production`."""
        for file in self.taken():
            inbox.refuse(file, reason)
        self._remember([])
        if self._production:
            git(self._root, "update-ref", f"refs/heads/{_BRANCH}", self._production)

    def update_imports(self) -> None:
        """Fetch imported files again; what there was stays where that fails, or the data is bad."""
        update_imports(self.project)
        commit_all(self.project.root, "Update imported data")

    def is_accepted(self) -> bool:
        """Tell whether `production` contains it."""
        tip, production = self.tip(), self._production
        return bool(tip and production and contains(self._root, production, tip))

    def has_accepted_inputs(self) -> bool:
        """Tell whether `production` holds the same inputs."""
        return bool(self._production) and self.inputs_sha256() == self.inputs_sha256(BRANCH)

    def inputs_sha256(self, commit: str = "HEAD") -> str:
        """Hash all that a commit, by default its own, tracks but results."""
        root = self.project.root
        results = {f"{prefix(root)}{name}" for name in _RESULTS}
        listed = git(root, "ls-tree", "-r", "-z", "--full-tree", commit).split("\0")
        rows = [row for row in listed if row.partition("\t")[2] not in results]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    def md5_of(self, out: str) -> str:
        """Return DVC's hash of an output."""
        stages = read_yaml(self.project.root / "dvc.lock")["stages"].values()
        rows = [row for stage in stages for row in stage["outs"] if row["path"] == out]
        found: str = rows[0]["md5"]
        return found

    def accept(self) -> None:
        """Let `production` move on to it.

        Raises `WorktreeError` if that moved elsewhere or was checked out meanwhile.
        """
        tip, production = self.tip(), self._production
        if tip is not None and not self.is_accepted():
            if production and not contains(self._root, tip, production):
                raise WorktreeError(
                    f"{BRANCH} moved elsewhere while {_BRANCH} was trained; merge {_BRANCH} into it"
                )
            refuse_checked_out(self._root, (BRANCH,))
            git(self._root, "update-ref", f"refs/heads/{BRANCH}", tip, *filter(None, [production]))
        self._remember([])


def _move(file: Path, to: Path, *, sha256: str) -> None:
    """Move a file that was taken, unless it has changed since."""
    try:
        if file_sha256(file) == sha256:
            to.parent.mkdir(parents=True, exist_ok=True)
            file.replace(to)
    except OSError as error:
        logger.warning("%s: taken, but not moved: %s", file, error.strerror)
