"""Prefect's pages for this project, on this machine alone, until Ctrl-C.

    python -m flows.ui [--port 4200]

A server, the deployments of prefect.yaml, a worker that runs them, a watcher of data/inbox and the
reports, at the next port. All of them, and what the worker runs, end with it.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from socket import AF_INET, SOCK_STREAM, socket

import psutil
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
from dlplora.errors import DlpLoraError
from dlplora.lifecycle import schedule
from dlplora.scratch import alone, is_held
from flows.settings import API_FILE, ROOT, SCRATCH, UI_LOCK, own_api
from flows.shown import REPORTS, REPORTS_URL

_MARK = "DLPLORA_UI"  # in the environment of all that is started here
_HOST = "127.0.0.1"
_POOL = "dlplora"
_POLL_SECONDS = 1.0
_START_SECONDS = 120.0
_STOP_SECONDS = 15.0


class UiError(DlpLoraError):
    """A part of it could not start, or ended."""


def serve(port: int, *, tell: Callable[[str], None]) -> None:
    """Run all parts until one ends or the process is asked to; `tell` gets the address."""
    if is_held(UI_LOCK, scratch=SCRATCH):
        api = own_api() or "closing"
        raise UiError(f"the pages of this project are open already: {api.removesuffix('/api')}")
    for number in (port, port + 1):
        with closing(socket(AF_INET, SOCK_STREAM)) as tried:
            if tried.connect_ex((_HOST, number)) == 0:
                raise UiError(f"port {number} of {_HOST} is taken; choose another one with --port")
    address, reports = f"http://{_HOST}:{port}", f"http://{_HOST}:{port + 1}"
    environment = os.environ | {
        "PREFECT_API_URL": f"{address}/api",
        "DLPLORA_ROOT": str(ROOT),
        REPORTS_URL: reports,
        _MARK: str(os.getpid()),
    }
    REPORTS.mkdir(parents=True, exist_ok=True)
    API_FILE.parent.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    with alone(UI_LOCK, scratch=SCRATCH), _ending_all(environment[_MARK], running):
        API_FILE.write_text(f"{address}/api\n", encoding="utf-8")
        prefect = ["-m", "prefect", "--no-prompt"]
        parts = {"server": [*prefect, "server", "start", "--host", _HOST, "--port", str(port)]}
        parts["reports"] = ["-m", "http.server", str(port + 1), "--bind", _HOST]
        parts["reports"] += ["--directory", str(REPORTS)]
        for name, words in parts.items():
            running[name] = _start(name, words, environment)
        _wait_for(f"{address}/api/health", running["server"])
        _run(
            [*prefect, "work-pool", "create", _POOL, "--type", "process", "--overwrite"],
            environment,
        )
        _run([*prefect, "deploy", "--all"], environment)
        _end_lost_runs(f"{address}/api")
        running["watcher"] = _start("watcher", ["-m", "flows.watch"], environment)
        worker = [*prefect, "worker", "start", "--pool", _POOL, "--name", "here"]
        running["worker"] = _start("worker", worker, environment)
        tell(address)
        is_on = None
        while True:
            for name, part in running.items():
                if part.poll() is not None:
                    raise UiError(f"the {name} has ended; its log is {_log(name)}")
            if is_on != (is_on := schedule.is_on(ROOT)):
                _set_schedules(f"{address}/api", is_on=is_on)
            time.sleep(_POLL_SECONDS)


def _end_lost_runs(api: str) -> None:
    """Mark runs as crashed that were killed with an earlier server, and free their places.

    The server knows which places are taken, but no longer by whom: it would never free them.
    """
    begun = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING])
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


def _log(name: str) -> Path:
    return SCRATCH / "prefect" / f"{name}.log"


def _start(name: str, words: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a part as the head of a session, so that Ctrl-C reaches this process alone."""
    with _log(name).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _run(words: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *words],
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
        raise UiError(f"prefect {' '.join(words[3:])}: {told}")


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise UiError(f"the server does not answer; its log is {_log('server')}")


@contextmanager
def _ending_all(mark: str, running: dict[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """End all that was started within the block, and what that started, whatever became of it.

    The server is the last: what ends before still tells it so.
    """
    try:
        yield
    finally:
        API_FILE.unlink(missing_ok=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave some behind
        _end(mark, spared={running["server"].pid} if "server" in running else set())
        _end(mark, spared=set())


def _end(mark: str, *, spared: set[int]) -> None:
    """Ask the marked processes to end, and make them after some seconds."""
    deadline = time.monotonic() + _STOP_SECONDS
    asked: set[int] = set()
    while left := [process for process in _marked(mark) if process.pid not in spared]:
        is_late = time.monotonic() > deadline
        for process in left:
            with suppress(psutil.NoSuchProcess):
                if is_late:
                    process.kill()
                elif process.pid not in asked:
                    asked.add(process.pid)
                    process.terminate()
        time.sleep(0.1)


def _marked(mark: str) -> list[psutil.Process]:
    """List the processes whose environment bears the mark."""
    marked = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                marked.append(process)
    return [process for process in marked if process.pid != os.getpid()]


def main() -> None:
    """Run until Ctrl-C, SIGTERM or SIGHUP."""
    parser = ArgumentParser(prog="python -m flows.ui", description="Prefect's pages, on loopback.")
    parser.add_argument("--port", type=int, default=4200, help="of the pages; reports at the next")
    port = parser.parse_args().port
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)

    def tell(address: str) -> None:
        print(f"{address} – deployments, runs and artifacts; Ctrl-C ends it all", flush=True)

    with one_line_errors(), suppress(KeyboardInterrupt):
        serve(port, tell=tell)


if __name__ == "__main__":
    main()
