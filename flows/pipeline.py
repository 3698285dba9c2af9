"""The pipeline under Prefect: one task run for each stage of dvc.yaml.

    python -m flows.pipeline [TARGETS] [--force]

DVC owns the graph, the cache and the truth; this flow says when and how many at once, and shows.
"""

import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections import Counter
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore
from types import SimpleNamespace
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.futures import PrefectFuture
from prefect.server.api import server
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from dlplora.errors import DlpLoraError
from dlplora.params.load import load_params
from dlplora.project.worktrees import prefix, worktrees
from dlplora.scratch import is_held
from flows.settings import ROOT, has_own_server
from flows.shown import Bar, StageRow, show_report, show_scores, show_stages
from flows.stages import StageError, Step, Tree, alone_in, limits_of, plan

_POLL_SECONDS = 2.0
_TAKE_SECONDS = 60.0  # a place that is granted after that is lost for minutes
_RETRY_SECONDS = 5
_THREADS: TaskRunner[Any] = ThreadPoolTaskRunner()  # each only waits: as many as stages


class Slots:
    """Places for stages: so many at once here, so many of a kind on the whole Prefect server."""

    def __init__(self, tree: Tree, *, at_once: int, limits: dict[str, int]) -> None:
        self._tree = tree
        self._here = BoundedSemaphore(at_once)
        self._kinds = {name: BoundedSemaphore(limit) for name, limit in limits.items()}
        self._held: Counter[str] = Counter()
        with get_client(sync_client=True) as client:
            for name, limit in limits.items():
                client.upsert_global_concurrency_limit_by_name(name, limit)

    def wait(self, kind: str | None) -> ExitStack:
        """Wait for a place; it is given back when the result is closed."""
        with ExitStack() as stack:
            if kind is not None:
                stack.enter_context(self._kinds[kind])  # so that only one here asks the server
                self._wait_for_server(stack, kind)
            stack.enter_context(self._here)
            return stack.pop_all()

    def _wait_for_server(self, stack: ExitStack, kind: str) -> None:
        """Take a place of the server once one is free; ask for one only then."""
        with get_client(sync_client=True) as client:
            while True:
                self._tree.check()
                there = client.read_global_concurrency_limit_by_name(kind)
                if there.active_slots >= there.limit and self._is_alone():
                    self._release_lost(client, kind)
                elif there.active_slots < there.limit:
                    with suppress(TimeoutError):  # another flow was faster
                        taken = concurrency(kind, timeout_seconds=_TAKE_SECONDS, strict=True)
                        stack.enter_context(taken)
                        self._held[kind] += 1
                        stack.callback(self._held.subtract, [kind])
                        return
                time.sleep(_POLL_SECONDS)

    def _is_alone(self) -> bool:
        """Tell whether the server is the project's own and no other tree of it is at work."""
        runs = worktrees(ROOT)
        trees = [ROOT, *(run / prefix(ROOT) for run in runs)]
        others = [tree for tree in trees if tree.resolve() != self._tree.root.resolve()]
        at_work = (is_held("repro", scratch=tree / ".scratch") for tree in others)
        return has_own_server() and not any(at_work)

    def _release_lost(self, client: SyncPrefectClient, kind: str) -> None:
        """Give back places that a flow held when it was killed: the server never would."""
        update = GlobalConcurrencyLimitUpdate(active_slots=self._held[kind])
        client.update_global_concurrency_limit(kind, update)


class Run:
    """One pass over a tree's stages, and what is known of them so far."""

    def __init__(self, tree: Tree, slots: Slots, *, stale: set[str], force: bool) -> None:
        self._tree = tree
        self._slots = slots
        self._stale = stale
        self._force = force
        self._unchanged: set[str] = set()
        self.seconds: dict[str, float] = {}

    def bring_up_to_date(self, step: Step) -> State[None]:
        """Let DVC skip, restore or run a stage; return the state to show."""
        if not self._force and self._is_up_to_date(step):
            self._unchanged.add(step.name)
            return Completed(name="Cached", message="up to date")
        with self._slots.wait(step.limit):
            began = time.monotonic()
            try:
                outcome = self._tree.repro(step.name, force=self._force, tell=_telling(step.name))
            finally:
                self.seconds[step.name] = time.monotonic() - began
        if outcome == "ran":
            return Completed(message=outcome)
        if outcome == "up to date":
            self._unchanged.add(step.name)
        return Completed(name="Cached", message=outcome)

    def _is_up_to_date(self, step: Step) -> bool:
        """Tell it from what DVC said at the start, as far as nothing before the stage changed."""
        if self._unchanged.issuperset(step.needs):
            return step.name not in self._stale
        if step.limit is None:
            return False  # `dvc repro` finds out as fast
        with self._slots.wait(None):  # and is asked first where a place may be long to wait for
            return step.name not in self._tree.stale(step.name)


def _telling(stage: str) -> Any:
    log, bar = get_run_logger(), Bar(stage)

    def tell(line: str) -> None:
        log.info(line)
        bar.hear(line)

    return tell


@task(cache_policy=NO_CACHE, task_run_name="{step.name}", retry_delay_seconds=_RETRY_SECONDS)
def run_stage(step: Step, run: Run) -> State[None]:
    """Bring one stage up to date."""
    try:
        return run.bring_up_to_date(step)
    except StageError as error:
        return Failed(message=str(error))


def run_stages(root: Path, targets: list[str], *, force: bool, name: str) -> State[None]:
    """Bring stages up to date within a flow, and show them; returns the flow's own state.

    `name` is that of the report. Another flow or `dlplora repro` on the same tree is waited for.
    """
    try:
        with alone_in(root) as tree:
            steps = plan(root, targets)
            slots = Slots(
                tree,
                at_once=load_params(root / "params.yaml").flow.stages_at_once,
                limits=limits_of(root, steps),
            )
            run = Run(tree, slots, stale=tree.stale(), force=force)
            futures: dict[str, PrefectFuture[Any]] = {}
            for step in steps:
                futures[step.name] = run_stage.with_options(
                    name=step.name, retries=step.retries
                ).submit(
                    step,
                    run,
                    wait_for=[futures[need] for need in step.needs],
                    return_state=False,
                )
            for future in futures.values():
                future.wait()
            return _show(root, {name: future.state for name, future in futures.items()}, run, name)
    except DlpLoraError as error:
        return Failed(message=str(error))


def _show(root: Path, states: dict[str, State[Any]], run: Run, name: str) -> State[None]:
    rows = [
        StageRow(
            stage,
            state.name or state.type.value,
            (state.message or "")[:300],
            round(run.seconds[stage], 1) if stage in run.seconds else None,
        )
        for stage, state in states.items()
    ]
    show_stages(rows)
    done = {stage for stage, state in states.items() if state.is_completed()}
    if "compare" in done:
        show_scores(root)
    if "report" in done:
        show_report(root, name)
    told = [row.detail if row.stage in done else row.state for row in rows]
    summary = ", ".join(f"{count} {what}" for what, count in Counter(told).items())
    return Completed(message=summary) if len(done) == len(states) else Failed(message=summary)


@flow(task_runner=_THREADS, log_prints=True)
def pipeline(targets: list[str] = [], force: bool = False) -> State[None]:  # noqa: B006
    """Bring this working tree up to date.

    Args:
        targets: Stages, or groups of them such as adapter, with all that they need; none: all.
        force: Run them even if they are up to date.
    """
    return run_stages(ROOT, targets, force=force, name="main")


@flow(task_runner=_THREADS, log_prints=True, flow_run_name="{root.name}")
def worktree(
    root: Path,
    targets: list[str] = [],  # noqa: B006
    force: bool = False,
    name: str | None = None,
) -> State[None]:
    """Bring another working tree up to date, as `pipeline` does; `name` is that of its report."""
    return run_stages(root, targets, force=force, name=name or root.name)


def exit_on_signals() -> None:
    """Let signals end this process as an exception does: what it started ends, too.

    A server that Prefect starts for the flow gets a session of its own: Ctrl-C in a terminal would
    end it before the flow, which still talks to it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if "PREFECT_API_URL" not in os.environ:
        apart = partial(subprocess.Popen, start_new_session=True)
        vars(server)["subprocess"] = SimpleNamespace(**vars(subprocess) | {"Popen": apart})


def main() -> int:
    """Run the flow on the command line's words; the exit code tells whether all went well."""
    parser = ArgumentParser(
        prog="python -m flows.pipeline", description="Bring this tree up to date."
    )
    parser.add_argument("targets", nargs="*", help="stages or groups of them; all if none")
    parser.add_argument("--force", action="store_true", help="run them even if up to date")
    options = parser.parse_args()
    exit_on_signals()
    state = pipeline(options.targets, force=options.force, return_state=True)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
