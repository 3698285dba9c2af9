"""The app's command: what it starts, what it finds and leaves alone, and how all of it ends."""

import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dlplora.app.runs import StageRun
from dlplora.errors import DlpLoraError
from dlplora.scratch import alone
from flows import app
from flows.parts import PartError
from flows.runs import PrefectRuns
from flows.settings import UI_LOCK
from tests.flows.dummies import Tree, answering, free_ports, make_deployable, marked, seldom
from tests.waiting import until

MARK = "DLPLORA_APP"
APP = """\
import time

def serve(*, root, runs, model_url, model_trouble, host, port, password, tell, max_file_mib):
    tell(f"app at {host}:{port}, model at {model_url}, {len(runs.recent(5))} runs")
    while True:
        (root / ".scratch/trouble").write_text(str(model_trouble()))
        time.sleep(0.05)
"""
PAGES_APP = APP.replace(", {len(runs.recent(5))} runs", "")
SERVER = """\
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Annotated
import typer

def serve(
    model: Annotated[Path, typer.Option()],
    port: Annotated[int, typer.Option()],
    all_systems: Annotated[bool, typer.Option("--all-systems")] = False,
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"{model} {all_systems}".encode())

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A tree whose app and model's server only tell what they were given."""
    tree = make_deployable(tmp_path / "project")
    (tree.root / "dlplora/app/server.py").write_text(APP)
    (tree.root / "dlplora/cli/serve.py").write_text(SERVER)
    return tree


def start(tree: Tree, *words: object) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
    with (tree.root.parent / "app.log").open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.app", *map(str, words)],
            cwd=tree.root,
            env=environment | {"PATH": os.defpath},
            stdout=file,
            stderr=file,
        )


def asked(port: int) -> str:
    with (
        suppress(OSError),
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer,
    ):
        return str(answer.read().decode())
    return ""


def stages_of(runs: PrefectRuns, run: str) -> dict[str, StageRun]:
    return {stage.name: stage for stage in runs.stages(run)}


def test_all_is_started_runs_are_cancelled_and_no_process_is_left(tree: Tree) -> None:
    tree.write("colours", "wait")
    port, ui_port, server_port = free_ports(), free_ports(), free_ports()
    running = start(tree, "--port", port, "--ui-port", ui_port, "--server-port", server_port)
    try:
        until(lambda: "app at" in tree.lines("app.log") or running.poll() is not None)
        told = f"app at 127.0.0.1:{port}, model at http://127.0.0.1:{server_port}, 0 runs"
        assert told in tree.lines("app.log")
        trouble = (tree.root / ".scratch/trouble").read_text()
        assert trouble.startswith(
            "no model to serve yet: dlp_mlp needs data/adapters; run `make repro`"
        )

        runs = PrefectRuns(f"http://127.0.0.1:{ui_port}/api")
        run = runs.start("pipeline/this-tree", {"targets": ["adapter@colours"]})
        waiting = "adapter@colours"
        log = tree.root / ".scratch/prefect/worker.log"
        until(lambda: "adapter colours: 1/4" in log.read_text(), within=60)
        until(seldom(lambda: stages_of(runs, run)[waiting].percent == 25.0), within=30)
        runs.cancel(run)
        until(seldom(lambda: runs.read(run).is_over), within=60)
        assert runs.read(run).state == "Cancelled"
        until(lambda: stages() == [], within=30)

        (tree.root / ".models/v1").mkdir(parents=True)
        (tree.root / ".models/current").symlink_to("v1")
        until(lambda: asked(server_port) == f"{tree.root}/.models/current True", within=30)

        (tree.root / ".scratch/go").touch()
        again = runs.start_again(run)
        until(seldom(lambda: runs.read(again).is_over), within=90)
        ended = runs.read(again)
        assert (ended.state, ended.deployment) == ("Completed", "pipeline/this-tree")
        assert stages_of(runs, again)[waiting].message == "ran"
        assert [each.id for each in runs.recent(5)] == [again, run]
        listening = {
            connection.laddr.ip
            for process in marked(MARK, running.pid)
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=120) == 0
    assert marked(MARK, running.pid) == []
    assert not (tree.root / ".scratch/prefect/api").exists()


def stages() -> list[psutil.Process]:
    """List the stages of dummy pipelines that run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "stage.py" in process.cmdline():
                found.append(process)
    return found


def test_what_is_open_already_is_used_and_left_alone(tree: Tree) -> None:
    (tree.root / "dlplora/app/server.py").write_text(PAGES_APP)
    (tree.root / ".models/v1").mkdir(parents=True)
    (tree.root / ".models/current").symlink_to("v1")
    port, ui_port, server_port = free_ports(), free_ports(), free_ports()
    api = tree.root / ".scratch/prefect/api"
    api.parent.mkdir(parents=True)
    with (
        alone(UI_LOCK, scratch=tree.root / ".scratch"),
        answering(ui_port),
        answering(server_port),
    ):
        api.write_text(f"http://127.0.0.1:{ui_port}/api\n")
        running = start(tree, "--port", port, "--server-port", server_port)
        try:
            until(lambda: "app at" in tree.lines("app.log") or running.poll() is not None)
            assert marked(MARK, running.pid) == []
        finally:
            running.send_signal(signal.SIGHUP)
            assert running.wait(timeout=60) == 0
    assert "app at" in tree.lines("app.log")
    assert api.exists()


def test_a_password_is_needed_for_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(app.PASSWORD, raising=False)
    assert app.read_password(None) is None
    app.check_host("127.0.0.1", None)
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(DlpLoraError, match=rf"--host {host} .*{app.PASSWORD}"):
            app.check_host(host, None)
        app.check_host(host, "long enough")
    monkeypatch.setenv(app.PASSWORD, "of the environment")
    assert app.read_password(None) == "of the environment"
    file = tmp_path / "password"
    file.write_text("of the file\n")
    assert app.read_password(file) == "of the file"
    file.write_text("\n")
    with pytest.raises(DlpLoraError, match="password: the password has 0 characters"):
        app.read_password(file)
    with pytest.raises(DlpLoraError, match="the password cannot be read"):
        app.read_password(tmp_path / "none")


def test_what_is_in_the_way_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_ports()
    with (
        answering(port),
        pytest.raises(PartError, match=f"port {port} of 127.0.0.1 is taken.* --port"),
    ):
        app.run(app.read_options(["--port", str(port)]), tell=str)
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    with pytest.raises(DlpLoraError, match=r"the app needs gradio: pip install 'dlplora\[app\]'"):
        app.run(app.read_options([]), tell=str)
