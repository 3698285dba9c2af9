"""The candidate of a retrain: the branch `runs/retrain` in a worktree of its own.

It is `production` merged with the commit that is checked out here, and the files of the inbox. A
candidate that was cut off is gone on with, so that every step can be repeated.
"""

import hashlib
import logging
from pathlib import Path

from dlplora.errors import DlpLoraError
from dlplora.lifecycle import inbox
from dlplora.lifecycle.registry import BRANCH, CARD, Registry
from dlplora.params.load import load_params
from dlplora.params.yaml import read_yaml
from dlplora.project.commands import CommandError, dvc, git
from dlplora.project.files import Project
from dlplora.project.own_tasks import is_import, tracker_of
from dlplora.project.repro import run_cli
from dlplora.project.worktrees import (
    RETRAIN,
    WorktreeError,
    check_out_files,
    clear_locks,
    commit_all,
    commit_of,
    merge,
    open_worktree,
    prefix,
    reset,
    uncommitted,
)

logger = logging.getLogger(__name__)
_BRANCH = f"runs/{RETRAIN}"
_RESULTS = ("dvc.lock", "data/metrics.json", str(CARD))  # made again: no inputs
_TRAILER = "Inbox"


class Candidate:
    """What a retrain trains and judges. `project` is its folder once it is open.

    Raises `WorktreeError` if there is no commit, or if `production` is checked out here.
    """

    project: Project

    def __init__(self, root: Path) -> None:
        self._root = root
        self._head = commit_of(root)
        if git(root, "branch", "--show-current") == BRANCH:
            raise WorktreeError(
                f"{root.resolve()}: the branch {BRANCH}, which retrains move on, is checked out "
                f"here; switch to a branch of your own"
            )
        clear_locks(root, (_BRANCH, BRANCH), tags="model*")
        for changed in uncommitted(root):
            logger.warning("%s: its uncommitted changes are not part of this retrain", changed)

    def may_have_news(self) -> bool:
        """Tell whether anything may differ from what `production` was made of."""
        production = _tip(self._root, BRANCH)
        return (
            production is None
            or self.is_unfinished()
            or bool(inbox.files_in(self._root))
            or self._has_imports(production)
            or not _is_ancestor(self._root, self._head, production)
        )

    def is_unfinished(self) -> bool:
        """Tell whether a candidate was begun that was neither registered nor accepted."""
        tip, production = self.tip(), _tip(self._root, BRANCH)
        if tip is None or Registry(self._root).at(tip):
            return False
        return production is None or not _is_ancestor(self._root, tip, production)

    def tip(self) -> str | None:
        """Return the candidate's last commit."""
        return _tip(self._root, _BRANCH)

    def open(self) -> None:
        """Check it out, as it was cut off or as `production`, and merge what is checked out here.

        Raises `WorktreeError` naming the files that both have changed.
        """
        start, goes_on = _tip(self._root, BRANCH) or self._head, self.is_unfinished()
        if goes_on:
            logger.info("going on with the retrain that was cut off")
        folder = open_worktree(self._root, RETRAIN, start=start, is_ours=True)
        self.project = Project(folder)
        with self.project.alone():  # what a killed retrain has left running ends first
            reset(folder, to="HEAD" if goes_on else start)
        for file in folder.glob("data/raw/*/[!.]*"):
            if file.suffix != ".dvc" and not tracker_of(file).exists():
                file.unlink()  # copied, and not tracked when it was cut off
        merge(folder, self._head, results=_RESULTS)
        check_out_files(folder)
        self.project.make_raw_folders()
        commit_all(folder, "Add the folders of tasks")

    def take_inbox(self) -> None:
        """Take the files of the inbox in: copied, tracked and committed, and only then moved."""
        files = inbox.settled(inbox.files_in(self._root))
        if not files:
            return
        self._fetch_raw()
        folder = inbox.taken_folder(self._root)
        moves: dict[Path, Path] = {}
        for file in files:
            if inbox.is_taken(self.project, file):
                moves[file] = self._begun_move(file) or folder / file.name
                continue
            arrival = inbox.check(self.project, file)
            if arrival.problem is None:
                inbox.take(self.project, file)
                moves[file] = folder / file.name
                logger.info("%s: %d new questions of %s", file, arrival.num_new, arrival.task)
            else:
                refused = inbox.refuse(self._root, file, arrival.problem)
                logger.warning("%s: refused: %s", refused, arrival.problem)
        if moves:
            names = ", ".join(file.name for file in moves)
            places = [to.relative_to(self._root / inbox.INBOX) for to in moves.values()]
            trailers = "\n".join(f"{_TRAILER}: {place}" for place in places)
            commit_all(self.project.root, f"Take {names} from the inbox\n\n{trailers}")
        for file, target in moves.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)

    def taken(self) -> list[Path]:
        """List where the files stand that it took from the inbox."""
        tip, start = self.tip(), _tip(self._root, BRANCH)
        words = ("log", f"--format=%(trailers:key={_TRAILER},valueonly)")
        lines = git(self._root, *words, f"{start}..{tip}" if start else str(tip)).splitlines()
        return [self._root / inbox.INBOX / line for line in dict.fromkeys(lines) if line]

    def update_imports(self) -> None:
        """Fetch imported files again; what there was stays where that fails, or the data is bad."""
        root = self.project.root
        trackers = sorted(path for path in root.glob("data/raw/*/*.dvc") if is_import(path))
        if trackers:
            self._fetch_raw()
        for tracker in trackers:
            name = str(tracker.relative_to(root))
            try:
                dvc(root, "update", name)
                inbox.check_task(self.project, tracker.parent.name)
            except DlpLoraError as error:
                logger.warning("%s: not updated: %s", name, error)
                git(root, "checkout", "--", name)
                dvc(root, "checkout", "--force", name)
        commit_all(root, "Update imported data")

    def inputs_sha256(self) -> str:
        """Hash all that its commit tracks but results."""
        root = self.project.root
        results = {f"{prefix(root)}{name}" for name in _RESULTS}
        listed = git(root, "ls-tree", "-r", "--full-tree", "HEAD").splitlines()
        rows = [row for row in listed if row.partition("\t")[2] not in results]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    def md5_of(self, out: str) -> str:
        """Return DVC's hash of an output."""
        stages = read_yaml(self.project.root / "dvc.lock")["stages"].values()
        rows = [row for stage in stages for row in stage["outs"] if row["path"] == out]
        found: str = rows[0]["md5"]
        return found

    def accept(self) -> None:
        """Let `production` move on to it, unless that has moved elsewhere."""
        tip, production = self.tip(), _tip(self._root, BRANCH)
        if tip and (production is None or _is_ancestor(self._root, production, tip)):
            git(self._root, "update-ref", f"refs/heads/{BRANCH}", tip, *filter(None, [production]))

    def _has_imports(self, production: str) -> bool:
        """Tell whether `production` has imported files, which may have changed elsewhere."""
        words = ("ls-tree", "-r", "--name-only", production, "--", "data/raw")
        trackers = [line for line in git(self._root, *words).splitlines() if line.endswith(".dvc")]
        texts = [git(self._root, "show", f"{production}:./{line}") for line in trackers]
        return any("\ndeps:" in f"\n{text}" for text in texts)

    def _begun_move(self, file: Path) -> Path | None:
        """Return where a file was to be moved that is committed and still in the inbox."""
        begun = (path for path in self.taken() if path.name == file.name and not path.exists())
        return next(begun, None)

    def _fetch_raw(self) -> None:
        """Make what is needed to check raw files: those of sources, and the base model."""
        sources = load_params(self.project.params_file).sources
        run_cli(self.project.root, "repro", "base_model", *(f"fetch@{key}" for key in sources))


def _tip(root: Path, branch: str) -> str | None:
    """Return the commit of a branch, if there is one."""
    try:
        return git(root, "rev-parse", "--verify", "--quiet", f"refs/heads/{branch}")
    except CommandError:
        return None


def _is_ancestor(root: Path, commit: str, of: str) -> bool:
    try:
        git(root, "merge-base", "--is-ancestor", commit, of)
    except CommandError:
        return False
    return True
