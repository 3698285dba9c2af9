"""The pages: all parts come up on loopback, deployments run as asked, and no process is left."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.flows.dummies import Tree, free_ports, make_deployable, marked
from tests.waiting import until

MARK = "DLPLORA_UI"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return make_deployable(tmp_path / "project")


def start(tree: Tree, log: str, port: int) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
    with (tree.root.parent / log).open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.ui", "--port", str(port)],
            cwd=tree.root,
            env=environment | {"PATH": os.defpath},
            stdout=file,
            stderr=file,
        )


def retrains_on_time() -> list[bool]:
    """Tell of each schedule of the retrains whether it is on."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("retrain/scheduled")
    return [schedule.active for schedule in deployment.schedules]


def retrains() -> list[FlowRun]:
    """List the retrains that something has started; those on time are left out."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("retrain/scheduled")
        runs = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
        )
    return [run for run in runs if not run.auto_scheduled]


def test_a_deployment_runs_and_ctrl_c_leaves_no_process(tree: Tree) -> None:
    """Retrains are on time once that is switched on, and begin with a file in the inbox.

    Runs that were killed with their server take no places of those that follow.
    """
    port = free_ports()
    tree.write("colours", "wait")
    pages = start(tree, "ui.log", port)
    try:
        until(lambda: "Ctrl-C ends it all" in tree.lines("ui.log") or pages.poll() is not None)
        assert f"http://127.0.0.1:{port}" in tree.lines("ui.log")
        assert start(tree, "second.log", port).wait() == 1
        assert tree.lines("second.log").startswith("error: the pages of this project are open")
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
            first = run_deployment(
                "pipeline/this-tree", parameters={"targets": ["base_model"]}, timeout=600
            )
            assert first.state is not None
            assert first.state.is_completed(), first.state.message
            with get_client(sync_client=True) as client:
                form = client.read_deployment_by_name("experiment/worktree")
            assert form.parameter_openapi_schema is not None
            assert form.parameter_openapi_schema["properties"]["suite"]["enum"] == ["toy"]
            assert retrains_on_time() == [False]
            for told in (True, False):
                tree.run("git", "config", "dlplora.schedule", str(told).lower())
                until(lambda told=told: retrains_on_time() == [told], within=30)
            assert retrains() == []
            (tree.root / "data/inbox").mkdir(parents=True, exist_ok=True)
            (tree.root / "data/inbox/colours.json").write_text("[]")
            until(lambda: retrains() != [], within=60)
            lost = run_deployment("pipeline/this-tree", timeout=0)
        stages = tree.root / ".scratch/prefect/worker.log"
        until(lambda: "adapter colours: 1/4" in stages.read_text())
        with urllib.request.urlopen(f"http://127.0.0.1:{port + 1}/") as answer:
            assert answer.status == 200
        listening = [
            connection.laddr.ip
            for process in marked(MARK, pages.pid)
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert set(listening) == {"127.0.0.1"}

        for process in [psutil.Process(pages.pid), *marked(MARK, pages.pid)]:
            process.kill()
        pages.wait()
        until(lambda: marked(MARK, pages.pid) == [])
        pages = start(tree, "again.log", port)
        until(lambda: "Ctrl-C ends it all" in tree.lines("again.log") or pages.poll() is not None)
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(lost.id).state
            assert state is not None
            assert state.is_crashed()
            again = run_deployment(
                "pipeline/this-tree", parameters={"targets": ["base_model"]}, timeout=600
            )
            assert again.state is not None
            assert again.state.is_completed(), again.state.message
    finally:
        pages.send_signal(signal.SIGINT)
        assert pages.wait(timeout=120) == 0
    assert marked(MARK, pages.pid) == []
    (tree.root / ".scratch/go").touch()
    assert tree.flow().state.is_completed()
