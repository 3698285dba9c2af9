"""A retrain: new data and commits → candidate → gate → a version that is promoted or kept.

The candidate is built on the branch `runs/retrain` in a worktree of its own: the branch
`production`, merged with the commit that is checked out here, and the files of the inbox.
`production` moves on to it unless the gate refuses it, so that it holds nothing that made answers
worse. Every step can be repeated: a retrain that was killed goes on where it was.
"""

import hashlib
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dlplora.errors import DlpLoraError
from dlplora.lifecycle import inbox
from dlplora.lifecycle.gate import decide
from dlplora.lifecycle.registry import BRANCH, CARD, Registry, Version
from dlplora.params.load import load_params
from dlplora.params.yaml import read_yaml
from dlplora.project.commands import CommandError, dvc, environment, git
from dlplora.project.files import Project
from dlplora.project.own_tasks import is_import, tracker_of
from dlplora.project.suites import suite_of
from dlplora.project.worktrees import (
    RETRAIN,
    WorktreeError,
    clear_locks,
    commit_all,
    commit_of,
    merge,
    open_worktree,
    prefix,
    reset,
    uncommitted,
)
from dlplora.records.files import read_json, record_of, write_json
from dlplora.records.model_card import VersionCard, read_model_card
from dlplora.records.verdict import Judgement
from dlplora.scratch import alone

logger = logging.getLogger(__name__)
_CANDIDATE = f"runs/{RETRAIN}"
_RESULTS = ("dvc.lock", "data/metrics.json", str(CARD))  # made again: no inputs
_VERDICT = Path(".scratch/verdict.json")
_TRAILER = "Inbox"


@dataclass(frozen=True)
class Outcome:
    """How a retrain ended: the version it registered, if any, and what it says."""

    version: Version | None
    message: str


def retrain(root: Path, run_pipeline: Callable[[Path], None]) -> Outcome:
    """Retrain if there is anything new; another retrain is waited for first.

    `run_pipeline` brings a working tree up to date, and raises a `DlpLoraError` if it cannot.
    The user's checkout, index and branch stay as they are. Raises `DlpLoraError` if there is no
    commit, if the user's commit conflicts with `production`, or if a step fails.
    """
    with alone(RETRAIN, scratch=root / ".scratch"):
        return _Retrain(root).run(run_pipeline)


class _Retrain:
    """One retrain of a project."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._registry = Registry(root)
        self._head = commit_of(root)
        if git(root, "branch", "--show-current") == BRANCH:
            raise WorktreeError(
                f"{root}: the branch {BRANCH}, which retrains move on, is checked out here; "
                f"switch to a branch of your own"
            )

    def run(self, run_pipeline: Callable[[Path], None]) -> Outcome:
        clear_locks(self._root, (_CANDIDATE, BRANCH), tags="model*")
        for changed in uncommitted(self._root):
            logger.warning("%s: its uncommitted changes are not part of this retrain", changed)
        self._settle_registered()
        self._registry.current()
        if not self._may_have_news():
            return self._nothing_new(self._registry.promoted())
        project = self._open()
        merge(project.root, self._head, results=_RESULTS)
        project.make_raw_folders()
        commit_all(project.root, "Add the folders of tasks")
        self._take_inbox(project)
        self._update_imports(project)
        inputs = _inputs_sha256(project.root)
        if known := self._known(lambda version: version.card.inputs == inputs):
            return self._nothing_new(known.name)
        run_pipeline(project.root)
        commit_all(project.root, "Keep the results of a retrain")
        model_md5 = _md5_of(project.root, "data/model")
        if known := self._known(lambda version: version.card.model_md5 == model_md5):
            if known.card.decision != "refused":
                self._move_on(_tip(project.root))
            return self._nothing_new(known.name)
        return self._register(project, inputs=inputs, model_md5=model_md5)

    def _may_have_news(self) -> bool:
        """Tell whether anything differs from what `production` was made of, as far as git knows."""
        tip = _tip(self._root, BRANCH)
        if tip is None or self._registry.promoted() is None or self._unfinished():
            return True
        if inbox.files_in(self._root):
            return True
        tree = git(self._root, "ls-tree", "-r", "--name-only", tip, "--", "data/raw")
        trackers = [line for line in tree.splitlines() if line.endswith(".dvc")]
        texts = [git(self._root, "show", f"{tip}:./{line}") for line in trackers]
        if any("\ndeps:" in f"\n{text}" for text in texts):
            return True  # an import may have changed
        return not _is_ancestor(self._root, self._head, tip)

    def _unfinished(self) -> bool:
        """Tell whether a candidate was begun that was neither registered nor moved on to."""
        tip = _tip(self._root, _CANDIDATE)
        if tip is None or self._registry.at(tip):
            return False
        production = _tip(self._root, BRANCH)
        return production is None or not _is_ancestor(self._root, tip, production)

    def _open(self) -> Project:
        """Open the worktree: where an unfinished candidate was, or at `production`."""
        start = _tip(self._root, BRANCH) or self._head
        goes_on = self._unfinished()
        if goes_on:
            logger.info("going on with the retrain that was cut off")
        folder = open_worktree(self._root, RETRAIN, start=start, is_ours=True)
        with Project(folder).alone():  # what a killed retrain has left running ends first
            reset(folder, to="HEAD" if goes_on else start)
        for file in folder.glob("data/raw/*/[!.]*"):
            if file.suffix != ".dvc" and not tracker_of(file).exists():
                file.unlink()  # copied, and not tracked when it was cut off
        return Project(folder)

    def _take_inbox(self, project: Project) -> None:
        """Take the files of the inbox in: copied, tracked and committed, and only then moved."""
        files = inbox.files_in(self._root)
        if not files:
            return
        inbox.wait_until_settled(files)
        _fetch_raw(project)
        folder = inbox.taken_folder(self._root)
        moves: dict[Path, Path] = {}
        for file in files:
            if inbox.is_taken(project, file):
                moves[file] = self._begun_move(project, file) or folder / file.name
                continue
            arrival = inbox.check(project, file)
            if arrival.problem is None:
                inbox.take(project, file)
                moves[file] = folder / file.name
                logger.info("%s: %d new questions of %s", file, arrival.num_new, arrival.task)
            else:
                refused = inbox.refuse(self._root, file, arrival.problem)
                logger.warning("%s: refused: %s", refused, arrival.problem)
        if moves:
            names = ", ".join(file.name for file in moves)
            trailers = "\n".join(f"{_TRAILER}: {self._inner(to)}" for to in moves.values())
            commit_all(project.root, f"Take {names} from the inbox\n\n{trailers}")
        for file, target in moves.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)

    def _inner(self, path: Path) -> str:
        return str(path.resolve().relative_to((self._root / inbox.INBOX).resolve()))

    def _taken(self, commit: str) -> list[Path]:
        """List where the files stand that a candidate took from the inbox."""
        start = _tip(self._root, BRANCH)
        span = f"{start}..{commit}" if start else commit
        words = ("log", f"--format=%(trailers:key={_TRAILER},valueonly)", span)
        lines = git(self._root, *words).splitlines()
        return [self._root / inbox.INBOX / line for line in dict.fromkeys(lines) if line]

    def _begun_move(self, project: Project, file: Path) -> Path | None:
        """Return where a file was to be moved that is committed and still in the inbox."""
        taken = self._taken(_tip(project.root) or "HEAD")
        return next((path for path in taken if path.name == file.name and not path.exists()), None)

    def _update_imports(self, project: Project) -> None:
        """Fetch imported files again; what there was stays where that fails, or the data is bad."""
        trackers = [
            tracker for tracker in project.root.glob("data/raw/*/*.dvc") if is_import(tracker)
        ]
        if trackers:
            _fetch_raw(project)
        for tracker in sorted(trackers):
            name = str(tracker.relative_to(project.root))
            try:
                dvc(project.root, "update", name)
                inbox.check_task(project, tracker.parent.name)
            except DlpLoraError as error:
                logger.warning("%s: not updated: %s", name, error)
                git(project.root, "checkout", "--", name)
                dvc(project.root, "checkout", "--force", name)
        commit_all(project.root, "Update imported data")

    def _known(self, is_same: Callable[[Version], bool]) -> Version | None:
        return next((each for each in self._registry.versions()[::-1] if is_same(each)), None)

    def _nothing_new(self, name: str | None) -> Outcome:
        known = None if name is None else self._registry.named(name)
        told = f"nothing new since {name}"
        if known is not None and known.card.decision == "refused":
            told += ", which was refused"
        return Outcome(None, told)

    def _register(self, project: Project, *, inputs: str, model_md5: str) -> Outcome:
        """Judge the candidate, commit and tag it, and let it take its place."""
        promoted, params = self._registry.current(), load_params(project.params_file)
        judgement = None if promoted is None else _judge(project, promoted)
        card = read_model_card(project.root / "data/model")
        scores = read_json(project.root / "data/metrics.json")
        version_card = VersionCard(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            suite=suite_of(project),
            score=scores["iid"][card.system],
            scores=scores,
            card=card,
            inputs=inputs,
            base_md5=_md5_of(project.root, "data/base"),
            model_md5=model_md5,
            verdict=judgement,
            decision=decide(judgement, approval=params.gate.approval),
        )
        write_json(project.root / CARD, asdict(version_card))
        told = "The first version." if judgement is None else str(judgement)
        commit_all(project.root, f"Register a model: {version_card.decision}\n\n{told}")
        self._registry.register(commit_of(project.root))
        version = self._settle_registered()
        assert version is not None
        return Outcome(version, told)

    def _settle_registered(self) -> Version | None:
        """Let the version that the candidate became take its place, as far as it has not yet."""
        tip = _tip(self._root, _CANDIDATE)
        name = self._registry.at(tip) if tip else None
        if tip is None or name is None:
            return None
        version = self._registry.named(name)
        decision = version.card.decision
        if decision == "refused":
            for file in self._taken(tip):
                if file.exists():
                    inbox.refuse(self._root, file, str(version.card.verdict))
            return version
        self._move_on(tip)
        if decision == "promoted" and name not in {e.version for e in self._registry.history()}:
            self._registry.promote(name)
        return version

    def _move_on(self, tip: str | None) -> None:
        """Let `production` move on to a commit that is made of it."""
        production = _tip(self._root, BRANCH)
        if tip and (production is None or _is_ancestor(self._root, production, tip)):
            git(self._root, "update-ref", f"refs/heads/{BRANCH}", tip, *filter(None, [production]))


def run_repro(folder: Path, *targets: str) -> None:
    """Bring a working tree up to date by `dlplora repro`; raises `DlpLoraError` if it fails."""
    words = [sys.executable, "-m", "dlplora.cli", "repro", *targets]
    done = subprocess.run(words, cwd=folder, env=environment(folder), check=False)
    if code := done.returncode:
        raise DlpLoraError(f"{folder}: the pipeline ended with exit code {code}")


def _fetch_raw(project: Project) -> None:
    """Make what is needed to check raw files: those of sources, and the base model."""
    sources = load_params(project.params_file).sources
    run_repro(project.root, "base_model", *(f"fetch@{source}" for source in sources))


def _judge(project: Project, promoted: Path) -> Judgement:
    """Compare the candidate with the promoted model, by the candidate's own code."""
    words = ["judge", "--against", str(promoted.resolve()), "--out", str(_VERDICT)]
    done = subprocess.run(
        [sys.executable, "-m", "dlplora.cli", *words],
        cwd=project.root,
        env=environment(project.root),
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if code := done.returncode:
        raise DlpLoraError(f"{project.root}: the gate ended with exit code {code}")
    return record_of(Judgement, read_json(project.root / _VERDICT))


def _inputs_sha256(project: Path) -> str:
    """Hash all that a commit tracks but results."""
    results = {f"{prefix(project)}{name}" for name in _RESULTS}
    listed = git(project, "ls-tree", "-r", "--full-tree", "HEAD").splitlines()
    rows = [row for row in listed if row.partition("\t")[2] not in results]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _md5_of(project: Path, out: str) -> str:
    """Return DVC's hash of an output."""
    stages = read_yaml(project / "dvc.lock")["stages"].values()
    found: str = next(row["md5"] for stage in stages for row in stage["outs"] if row["path"] == out)
    return found


def _tip(root: Path, branch: str = "HEAD") -> str | None:
    """Return the commit of a branch, if there is one."""
    try:
        return git(root, "rev-parse", "--verify", "--quiet", f"{branch}^{{commit}}")
    except CommandError:
        return None


def _is_ancestor(root: Path, commit: str, of: str) -> bool:
    try:
        git(root, "merge-base", "--is-ancestor", commit, of)
    except CommandError:
        return False
    return True
