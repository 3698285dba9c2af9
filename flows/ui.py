"""Prefect's pages for this project, on this machine alone, until Ctrl-C.

    python -m flows.ui [--port 4200]

A server, the deployments of prefect.yaml, a worker that runs them, a watcher of data/inbox and the
reports, at the next port. All of them, and what the worker runs, end with it.
"""

import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

from dlplora.edge import one_line_errors
from dlplora.lifecycle import schedule
from dlplora.scratch import alone, is_held
from flows.parts import HOST, PartError, Parts, answers, end_on_signals, refuse_taken
from flows.settings import API_FILE, ROOT, SCRATCH, UI_LOCK, own_api
from flows.shown import REPORTS, REPORTS_URL

_POOL = "dlplora"
_POLL_SECONDS = 1.0
_SETTINGS = {
    "PREFECT_WORKER_QUERY_SECONDS": "3",  # somebody waits for what was started on a page
    # A run that is cancelled in the moment in which the worker takes it is overlooked until then.
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "60",
}
_PREFECT = ("-m", "prefect", "--no-prompt")


def serve(port: int, *, tell: Callable[[str], None]) -> None:
    """Run all parts until one ends or the process is asked to; `tell` gets the address."""
    if is_held(UI_LOCK, scratch=SCRATCH):
        api = own_api() or "closing"
        raise PartError(f"the pages of this project are open already: {api.removesuffix('/api')}")
    for number in (port, port + 1):
        refuse_taken(number, "--port")
    address, reports = f"http://{HOST}:{port}", f"http://{HOST}:{port + 1}"
    api = f"{address}/api"
    environment = {"PREFECT_API_URL": api, "DLPLORA_ROOT": str(ROOT), REPORTS_URL: reports}
    parts = Parts("DLPLORA_UI", environment | _SETTINGS)
    with (
        alone(UI_LOCK, scratch=SCRATCH),
        parts.ending(first=lambda pid: pid not in parts.pids("server")),  # what ends tells it so
        _known(api),
    ):
        _open(parts, port, api)
        tell(address)
        is_on = None
        while True:
            parts.check()
            if is_on != (is_on := schedule.is_on(ROOT)):
                _set_schedules(api, is_on=is_on)
            time.sleep(_POLL_SECONDS)


@contextmanager
def _known(api: str) -> Iterator[None]:
    """Let flows of this project find the server within the block."""
    API_FILE.parent.mkdir(parents=True, exist_ok=True)
    API_FILE.write_text(f"{api}\n", encoding="utf-8")
    try:
        yield
    finally:
        API_FILE.unlink(missing_ok=True)


def _open(parts: Parts, port: int, api: str) -> None:
    """Start all parts, each once what it needs is there."""
    REPORTS.mkdir(parents=True, exist_ok=True)
    served = ["--bind", HOST, "--directory", str(REPORTS)]
    parts.start("server", [*_PREFECT, "server", "start", "--host", HOST, "--port", str(port)])
    parts.start("reports", ["-m", "http.server", str(port + 1), *served])
    parts.wait("server", lambda: answers(f"{api}/health"))
    for words in (
        ["work-pool", "create", _POOL, "--type", "process", "--overwrite"],
        ["deploy", "--all"],
    ):
        _run(words, parts.environment)
    _end_lost_runs(api)
    parts.start("watcher", ["-m", "flows.watch"])
    parts.start("worker", [*_PREFECT, "worker", "start", "--pool", _POOL, "--name", "here"])


def _end_lost_runs(api: str) -> None:
    """Mark runs as crashed that were killed with an earlier server, and free their places.

    The server knows which places are taken, but no longer by whom: it would never free them.
    """
    begun = FlowRunFilterStateType(
        any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
    )
    lost = FlowRunFilter(state=FlowRunFilterState(type=begun))
    with SyncPrefectClient(api) as client:
        for run in client.read_flow_runs(flow_run_filter=lost):
            client.set_flow_run_state(
                run.id, Crashed(message="It was killed together with its server."), force=True
            )
        for deployment in client.read_deployments():
            limit = deployment.global_concurrency_limit
            if limit is not None and limit.active_slots:
                client.update_global_concurrency_limit(
                    limit.name, GlobalConcurrencyLimitUpdate(active_slots=0)
                )


def _set_schedules(api: str, *, is_on: bool) -> None:
    """Switch the schedules of the retrains on or off."""
    with SyncPrefectClient(api) as client:
        deployment = client.read_deployment_by_name("retrain/scheduled")
        for row in deployment.schedules:
            client.update_deployment_schedule(deployment.id, row.id, active=is_on)


def _run(words: list[str], environment: dict[str, str]) -> None:
    """Run a command of Prefect to its end."""
    done = subprocess.run(
        [sys.executable, *_PREFECT, *words],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        told = f"{done.stdout}{done.stderr}"[-1000:]  # the reason is the last that it says
        raise PartError(f"prefect {' '.join(words)}: {told}")


def main() -> None:
    """Run until Ctrl-C, SIGTERM or SIGHUP."""
    parser = ArgumentParser(prog="python -m flows.ui", description="Prefect's pages, on loopback.")
    parser.add_argument("--port", type=int, default=4200, help="of the pages; reports at the next")
    port = parser.parse_args().port
    end_on_signals()

    def tell(address: str) -> None:
        print(f"{address} – deployments, runs and artifacts; Ctrl-C ends it all", flush=True)

    with one_line_errors(), suppress(KeyboardInterrupt):
        serve(port, tell=tell)


if __name__ == "__main__":
    main()
