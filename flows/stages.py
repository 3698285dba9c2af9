"""The stages of dvc.yaml, one after another: the only place of the flows that starts DVC.

DVC decides what is up to date, restored from its cache or run; nothing here knows Prefect.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import networkx
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage, Stage

from dlplora import warm
from dlplora.errors import DlpLoraError, ParamsError, choices, one_line
from dlplora.params.load import load_params
from dlplora.project.commands import environment, own_site_cache, prepare
from dlplora.project.files import Project
from dlplora.project.pruning import delete_unlisted
from dlplora.scratch import take_lock

Outcome = Literal["ran", "restored from the cache", "up to date"]
_DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]
_PLAIN = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
_GRACE_SECONDS = 5.0
_ADVICE = "To track the changes with git, run:"  # is all that follows of a stage that ended well
_HINTS = {"limit", "retries"}


class StageError(DlpLoraError):
    """A stage failed, or DVC could not read the pipeline."""


@dataclass(frozen=True)
class Step:
    """A stage of the pipeline, as DVC calls it, and what dvc.yaml says about it.

    `needs` are the steps before it. `limit` names how many of its kind run at once, in
    `flow.limits` of params.yaml; `retries` is how often it is tried again after a failure.
    """

    name: str
    needs: tuple[str, ...]
    limit: str | None
    retries: int


def plan(root: Path, targets: Sequence[str]) -> list[Step]:
    """List the targets (all of dvc.yaml if none) and what they need, each after its needs.

    Raises `StageError` if dvc.yaml cannot be read or has no such target.
    """
    try:
        cache = own_site_cache(root)
        with Repo(str(root), config=cache and {"core": {"site_cache_dir": str(cache)}}) as repo:
            graph = repo.index.graph  # an edge runs from a stage to one that it needs
            wanted = _wanted(graph, targets)
            needed = wanted.union(*(networkx.descendants(graph, stage) for stage in wanted))
            place = {stage: number for number, stage in enumerate(graph)}
            ordered = networkx.lexicographical_topological_sort(
                graph.subgraph(needed).reverse(), key=place.__getitem__
            )
            return [_step(stage, sorted(map(_name, graph.successors(stage)))) for stage in ordered]
    except DvcException as error:
        raise StageError(f"{root / 'dvc.yaml'}: {one_line(error)}") from error


def _wanted(stages: Collection[Stage], targets: Sequence[str]) -> set[Stage]:
    """Pick stages by name, or all of one `foreach`; without targets all but tracked files."""
    if not targets:
        return {stage for stage in stages if isinstance(stage, PipelineStage)}
    wanted: set[Stage] = set()
    for target in targets:
        found = {stage for stage in stages if target in (_name(stage), _name(stage).split("@")[0])}
        if not found:
            raise StageError(f"no stage {target!r}; there are: {choices(map(_name, stages))}")
        wanted |= found
    return wanted


def _name(stage: Stage) -> str:
    """Name a stage so that DVC takes the name as a target in the root."""
    if isinstance(stage, PipelineStage):
        return str(stage.name)
    return Path(stage.path_in_repo).as_posix()


def _step(stage: Stage, needs: Sequence[str]) -> Step:
    hints: Mapping[str, Any] = (stage.meta or {}).get("prefect", {})
    if unknown := set(hints) - _HINTS:
        raise StageError(
            f"dvc.yaml: {_name(stage)}.meta.prefect: {choices(unknown)}; expected {choices(_HINTS)}"
        )
    return Step(_name(stage), tuple(needs), hints.get("limit"), hints.get("retries", 0))


@contextmanager
def alone_in(root: Path) -> Iterator["Tree"]:
    """Have a working tree to oneself: waits for `dlplora repro` and for other flows there.

    Results that params.yaml no longer lists are deleted first. Ends what is still running.
    """
    project = Project(root)
    load_params(project.params_file)  # outside a project nothing is written, no lock either
    lock = take_lock("repro", scratch=project.scratch)
    tree = Tree(root, lock)
    try:
        delete_unlisted(project)
        project.make_raw_folders()
        prepare(root)
        yield tree
    finally:
        tree.stop()
        os.close(lock)


class Tree:
    """A working tree in which DVC runs stages, some of them at the same time.

    Each DVC is the head of a process group of its own and holds the tree's lock as well, so
    that the lock lasts as long as anything runs. The first stage that has to run starts the
    server of `dlplora.warm`.
    """

    def __init__(self, root: Path, lock: int) -> None:
        self.root = root
        self._lock = lock
        self._groups: set[int] = set()
        self._guard = threading.Lock()
        self._is_stopped = False
        self._server = ExitStack()
        self._told: dict[str, str] | None = None  # what stages' environment says of the server

    def stale(self, target: str | None = None) -> set[str]:
        """Ask DVC for the stages that differ from what it knows, of all or of one.

        It looks at each stage alone: what an outdated one will change is not foreseen.
        """
        words = ["status", "--json", *([target] if target else [])]
        lines: list[str] = []
        code = self._dvc(words, lines.append, errors=subprocess.DEVNULL)
        if code:
            self._dvc(words, lines.append, errors=subprocess.STDOUT)
            raise StageError(f"dvc {' '.join(words)}: {_reason(lines, code)}")
        return set(json.loads("\n".join(lines)))

    def repro(self, name: str, *, force: bool, tell: Callable[[str], None]) -> Outcome:
        """Bring one stage up to date; its lines go to `tell` as they come.

        Raises `StageError` with the stage's own error line if it fails.
        """
        lines: list[str] = []

        def listen(line: str) -> None:
            lines.append(line)
            if _ADVICE not in lines:
                tell(line)

        with self._guard:
            if self._told is None:
                self._told = self._server.enter_context(warm.server_for(self.root))
        words = ["repro", "--single-item", *(["--force"] if force else []), name]
        if code := self._dvc(words, listen, errors=subprocess.STDOUT):
            raise StageError(f"{name}: {_reason(lines, code)}")
        if f"Running stage '{name}':" in lines:
            return "ran"
        skipped = any(line.endswith("didn't change, skipping") for line in lines)
        return "up to date" if skipped else "restored from the cache"

    def stop(self) -> None:
        """End all that runs here, by force after a few seconds, and start nothing more."""
        with self._guard:
            self._is_stopped = True
            groups = set(self._groups)
        deadline = time.monotonic() + _GRACE_SECONDS
        for number in groups:
            _signal_group(number, signal.SIGTERM)
        while any(_signal_group(number, 0) for number in groups) and time.monotonic() < deadline:
            time.sleep(0.05)
        for number in groups:
            _signal_group(number, signal.SIGKILL)
        self._server.close()

    def check(self) -> None:
        """Raise `StageError` if the tree was stopped."""
        if self._is_stopped:
            raise StageError("cancelled")

    def _dvc(self, words: Sequence[str], tell: Callable[[str], None], *, errors: int) -> int:
        """Run DVC in a process group of its own; return its exit code."""
        with self._guard:
            self.check()
            running = subprocess.Popen(
                [*_DVC, *words],
                cwd=self.root,
                env=environment(self.root) | _PLAIN | (self._told or {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                pass_fds=[self._lock],
            )
            self._groups.add(running.pid)
        with running:
            assert running.stdout is not None
            for line in running.stdout:
                if line.strip():
                    tell(line.rstrip())
        with self._guard:
            self._groups.discard(running.pid)
        self.check()
        return running.returncode


def _signal_group(number: int, sent: int) -> bool:
    """Send a signal to a process group; tell whether there is one."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(number, sent)
        return True
    return False


def _reason(lines: Sequence[str], code: int) -> str:
    """Pick the line that says why: the stage's own, else the last one of DVC."""
    for start in ("error: ", "ERROR: "):
        for line in reversed(lines):
            if line.startswith(start):
                return line.removeprefix(start)
    return f"exit code {code}"


def limits_of(root: Path, steps: Sequence[Step]) -> dict[str, int]:
    """Return how many stages of each kind may run at once, for the kinds among the steps.

    Raises `ParamsError` if params.yaml has no such limit.
    """
    limits = load_params(root / "params.yaml").flow.limits
    named = {step.limit for step in steps if step.limit is not None}
    if missing := named - set(limits):
        raise ParamsError(
            f"params.yaml: flow.limits has no {choices(missing)}; there are: {choices(limits)}"
        )
    return {name: limits[name] for name in sorted(named)}
