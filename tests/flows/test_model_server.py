"""The model's server beside the app: there when a model is, and always of the newest one."""

import json
import os
import signal
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dlplora.errors import ModelError, ParamsError
from dlplora.scratch import alone
from flows import model_server, parts
from flows.model_server import CURRENT, DATA, ModelServer, model_to_serve
from flows.parts import Parts
from tests.flows.dummies import answering, free_ports, marked
from tests.project import params
from tests.waiting import until

MARK = "DLPLORA_TEST"
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"pid": os.getpid(), "model": model}).encode())

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
model = options["--model"]
if Path("broken").exists():
    sys.exit("error: it is broken")
HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""
SERVED = ("base", "adapters/opposites", "adapters/colours", "routers/mlp", "routers/tfidf")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that has params.yaml alone, and a server of models that only tells their names."""
    for name, value in {"ROOT": tmp_path, "HOME": tmp_path / ".scratch/prefect"}.items():
        monkeypatch.setattr(parts, name, value)
    monkeypatch.setattr(model_server, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(model_server, "_AGAIN_SECONDS", 1.0)
    values = params("0" * 64, tmp_path / "base")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (tmp_path / "server.py").write_text(SERVER)
    return tmp_path


@pytest.fixture
def server(root: Path) -> Iterator[ModelServer]:
    """The server of that project; no process of it is left."""
    handlers = {number: signal.getsignal(number) for number in parts._SIGNALS}
    started = Parts(MARK)
    server = ModelServer(started, root=root, port=free_ports(), command=["server.py"])
    try:
        with started.ending(first=lambda pid: True), server.kept_up():
            yield server
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert marked(MARK, os.getpid()) == []


def finish(root: Path) -> None:
    """Write what a pipeline leaves, as far as it counts here."""
    for name in SERVED:
        (root / DATA / name).mkdir(parents=True)
    (root / "data/routers/mlp/router.json").write_text("{}")


def promote(root: Path) -> None:
    (root / ".models/v1").mkdir(parents=True)
    (root / CURRENT).symlink_to("v1")


def asked(server: ModelServer) -> dict[str, Any]:
    with (
        suppress(OSError, ValueError),  # it may be killed while it answers
        urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer,
    ):
        return dict(json.loads(answer.read()))
    return {}


def serves(server: ModelServer, model: Path) -> Callable[[], bool]:
    return lambda: str(asked(server).get("model", "")).endswith(f"/{model}")


def test_it_comes_with_the_model_and_goes_on_when_it_is_killed(
    root: Path, server: ModelServer
) -> None:
    until(lambda: server.trouble is not None, within=20)
    assert str(server.trouble).startswith("no model to serve yet: dlp_mlp needs data/adapters")
    finish(root)
    until(serves(server, DATA), within=20)
    first = asked(server)["pid"]
    began = psutil.Process(first).create_time()
    os.kill(first, signal.SIGKILL)
    until(lambda: asked(server).get("pid", first) != first, within=20)
    assert psutil.Process(asked(server)["pid"]).create_time() >= began + 1.0


def test_new_results_are_served_once_the_pipeline_is_done(
    root: Path, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def is_held(name: str, *, scratch: Path) -> bool:
        nonlocal looks
        looks += 1
        return original(name, scratch=scratch)

    original = model_server.is_held
    monkeypatch.setattr(model_server, "is_held", is_held)
    finish(root)
    until(serves(server, DATA), within=20)
    first = asked(server)["pid"]
    with alone("repro", scratch=root / ".scratch"):
        (root / "data/adapters/colours/training.json").write_text("{}")
        until(lambda: looks > 3, within=20)
        assert asked(server)["pid"] == first
    until(lambda: asked(server).get("pid", first) != first, within=20)
    assert serves(server, DATA)()


def test_the_promoted_model_takes_over(root: Path, server: ModelServer) -> None:
    finish(root)
    until(serves(server, DATA), within=20)
    promote(root)
    until(serves(server, CURRENT), within=20)
    (root / DATA / "base").rmdir()
    assert model_to_serve(root) == CURRENT


def test_its_last_words_are_told(root: Path, server: ModelServer) -> None:
    (root / "broken").touch()
    promote(root)
    until(lambda: server.trouble == "error: it is broken", within=20)
    (root / "broken").unlink()
    until(serves(server, CURRENT), within=20)


def test_what_stands_at_its_port_is_left_alone(root: Path, server: ModelServer) -> None:
    port = int(server.url.rpartition(":")[2])
    with answering(port, 404):  # something else
        promote(root)
        until(lambda: "is taken" in (server.trouble or ""), within=20)
        assert server.trouble is not None
        assert server.trouble.startswith(f"port {port} of 127.0.0.1 is taken")
        assert server.trouble.endswith("--server-port")
    until(serves(server, CURRENT), within=20)


def test_a_server_of_this_project_is_left_alone_and_one_of_another_is_told(
    root: Path, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    until(lambda: server.trouble is not None, within=20)
    with answering(int(server.url.rpartition(":")[2])):
        until(lambda: "another project" in (server.trouble or ""), within=20)
        monkeypatch.chdir(root)
        until(lambda: server.trouble is None, within=20)
        promote(root)
        assert marked(MARK, os.getpid()) == []
    until(serves(server, CURRENT), within=20)


def test_a_model_is_served_once_all_of_its_default_system_is_there(root: Path) -> None:
    finish(root)
    assert model_to_serve(root) == DATA
    (root / "data/adapters/colours").rmdir()
    with pytest.raises(ModelError, match="dlp_mlp needs data/adapters/colours; run `make repro`"):
        model_to_serve(root)
    (root / "params.yaml").write_text("tasks: [")
    with pytest.raises(ParamsError):
        model_to_serve(root)
    promote(root)
    assert model_to_serve(root) == CURRENT
    (root / ".models/v1").rmdir()
    with pytest.raises(ParamsError):
        model_to_serve(root)
