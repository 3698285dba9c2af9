"""A server while things happen: clients go, the queue fills, adapters and versions change."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dlplora.cli.serve import serve
from dlplora.engine.answers import Piece
from dlplora.engine.scheduler import Scheduler
from dlplora.sampling import Sampling
from dlplora.serving.keys import Keys, KeysError
from dlplora.serving.server import ServerError, listen
from dlplora.systems.engine import Engine
from tests.peft_adapters import peft_pool
from tests.project import ROOT
from tests.serving.running import PLACE, SETTINGS, Running, running, write_version
from tests.tiny import TARGETS, tiny_model

ADMIN = {"Authorization": f"Bearer {'a' * 20}"}
CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 200, "ignore_eos": True}


def chat(text: str = "say red", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 6} | more


def text_of(reply: httpx.Response) -> str:
    text: str = reply.json()["choices"][0]["message"]["content"]
    return text


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def streaming(server: Running, **more: Any) -> Iterator[Iterator[str]]:
    """Stream an answer of many tokens whose first text has come."""
    with (
        httpx.Client(timeout=60) as client,
        client.stream(
            "POST", f"{server.url}{CHAT}", json=chat(**LONG, stream=True, **more)
        ) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        yield lines


def num_open(server: Running) -> int:
    return server.server.api.models.current.thread.num_open


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each token take a twentieth of a second: answers of 200 tokens are still running."""
    step = Scheduler.step

    def slow_step(self: Scheduler) -> list[Piece]:
        time.sleep(0.05)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slow_step)


def cancelled(server: Running) -> float:
    lines = server.get("/metrics").text.splitlines()
    name = 'dlplora_requests_finished_total{reason="cancelled"} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.mark.usefixtures("slow")
def test_a_client_that_goes_away_frees_its_place(data: Path) -> None:
    with running(data, max_batch_size=1) as server:
        with streaming(server):
            assert num_open(server) == 1
        wait_until(lambda: num_open(server) == 0, 2)
        assert cancelled(server) == 1
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}{CHAT}", json=chat(**LONG), timeout=0.3)
        wait_until(lambda: num_open(server) == 0, 2)
        assert cancelled(server) == 2
        assert server.post(CHAT, chat(max_tokens=1)).status_code == 200


@pytest.mark.usefixtures("slow")
def test_a_full_queue_is_told_with_the_time_to_wait(data: Path) -> None:
    with running(data, max_batch_size=1, max_queue=1) as server, streaming(server):
        waiting = threading.Thread(target=lambda: server.post(CHAT, chat(max_tokens=1)))
        waiting.start()
        wait_until(lambda: num_open(server) == 2)
        reply = server.post(CHAT, chat())
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            server.client().chat.completions.create(**chat(), model="base")
        never = server.post("/v1/completions", {"prompt": ["a"] * 3})
        assert (never.status_code, "3 answers" in never.text) == (400, True)
        figures = server.get("/metrics").text
        assert "dlplora_requests_running 1.0" in figures
        assert "dlplora_requests_waiting 1.0" in figures
    waiting.join()


@pytest.mark.usefixtures("slow")
def test_a_request_that_takes_too_long_ends(data: Path) -> None:
    bounds = replace(SETTINGS.bounds, seconds=1.0)
    with running(data, bounds=bounds) as server:
        reply = server.post(CHAT, chat(**LONG))
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "timeout"
        with streaming(server) as lines:
            told = [line for line in lines if line][-1]
        assert json.loads(told.removeprefix("data: "))["error"]["code"] == "timeout"
        wait_until(lambda: num_open(server) == 0)


@pytest.mark.parametrize("adapter_mib", [None, 1e-3])
def test_adapters_come_and_go_and_a_route_to_one_that_went_is_a_conflict(
    data: Path, tmp_path: Path, adapter_mib: float | None
) -> None:
    folder = tmp_path / "allowed"
    configs = {"new": {"r": 2, "target_modules": TARGETS["llama"]}}
    peft_pool(tiny_model(seed=3), configs, folder)
    shutil.copytree(folder / "new", tmp_path / "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    keys = Keys(admin=(b"a" * 20,))
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    with running(data, keys=keys, adapter_folders=[folder], adapter_mib=adapter_mib) as server:
        (folder / "loop").symlink_to(folder / "loop")
        for path in (
            "../outside",
            str(tmp_path / "outside"),
            "link",
            ".",
            "gone",
            "/",
            "loop",
            "\0",
        ):
            body = {"lora_name": "new", "lora_path": path}
            reply = server.post(load, body, headers=ADMIN)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "lora_path")
            assert str(tmp_path) not in reply.text.replace(path, "")
        assert (
            server.post(
                load, {"lora_name": "my-lora.v2", "lora_path": "new"}, headers=ADMIN
            ).status_code
            == 200
        )
        for name in ("../x", "a/b", "", "base", "dlp_mlp"):
            reply = server.post(load, {"lora_name": name, "lora_path": "new"}, headers=ADMIN)
            assert reply.status_code == 400, name
        assert server.post(CHAT, chat(model="new")).status_code == 404
        body = {"lora_name": "new", "lora_path": "new"}
        assert server.post(load, body, headers=ADMIN).status_code == 200
        assert server.post(load, body, headers=ADMIN).status_code == 400
        again = body | {"load_inplace": True}
        assert server.post(load, again, headers=ADMIN).status_code == 200
        assert {"id": "new"} in server.get("/lora-adapters").json()
        new, base = (text_of(server.post(CHAT, chat(model=m))) for m in ("new", "base"))
        assert new != base
        assert server.post(unload, {"lora_name": "new"}, headers=ADMIN).status_code == 200
        assert server.post(unload, {"lora_name": "new"}, headers=ADMIN).status_code == 404
        assert server.post(CHAT, chat(model="new")).status_code == 404
        assert server.post(CHAT, chat()).status_code == 200
        for name in ("colours", "opposites"):
            server.post(unload, {"lora_name": name}, headers=ADMIN)
        reply = server.post(CHAT, chat())
        assert reply.status_code == 409
        assert reply.json()["error"]["code"] == "adapter_unavailable"


def test_an_adapter_that_cannot_be_used_is_refused_without_paths(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "allowed"
    (folder / "empty").mkdir(parents=True)
    (folder / "pickled").mkdir()
    (folder / "pickled/adapter_model.bin").write_bytes(b"x")
    peft_pool(tiny_model(hidden=32), {"wide": {"r": 2, "target_modules": ["q_proj"]}}, folder)
    keys = Keys(admin=(b"a" * 20,))
    with running(data, keys=keys, adapter_folders=[folder]) as server:
        for path in ("empty", "pickled", "wide"):
            body = {"lora_name": "new", "lora_path": path}
            reply = server.post("/v1/load_lora_adapter", body, headers=ADMIN)
            assert reply.status_code == 400
            assert reply.json()["error"]["code"] == "adapter_unusable"
            assert str(tmp_path) not in reply.text
        assert server.post(CHAT, chat()).status_code == 200


@pytest.mark.usefixtures("slow")
def test_another_version_is_taken_over_while_answers_run(data: Path, tmp_path: Path) -> None:
    current = tmp_path / "current"
    for number, seed in ((1, 3), (2, 4)):
        write_version(data, tmp_path / f"v0.0.{number}", seed)
    shutil.copytree(tmp_path / "v0.0.1", tmp_path / "v0.0.3")
    (tmp_path / "v0.0.3/base/model.safetensors").write_bytes(b"broken")
    expected = {}
    for name in ("v0.0.1", "v0.0.2"):
        with Engine.load(tmp_path / name, system="dlp_mlp", place=PLACE) as engine:
            expected[name] = [
                one.text
                for one in engine.generate(
                    ["say red", "what is up ?"], sampling=Sampling(max_new_tokens=6)
                )
            ]
    current.symlink_to("v0.0.1")

    def switch(name: str) -> None:
        (tmp_path / "next").symlink_to(name)
        os.replace(tmp_path / "next", current)

    def fingerprint() -> str:
        told: str = server.post(CHAT, chat()).json()["system_fingerprint"]
        return told

    def answers() -> list[str]:
        return [text_of(server.post(CHAT, chat(text))) for text in ("say red", "what is up ?")]

    with running(current, systems=["dlp_mlp"]) as server:
        assert answers() == expected["v0.0.1"]
        first = weakref.ref(server.server.api.models.current.engine.base.model)
        assert server.get("/health").json()["version"] == "v0.0.1"
        with streaming(server) as lines:
            switch("v0.0.2")
            wait_until(lambda: fingerprint().startswith("v0.0.2-"))
            rest = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
        assert {one["system_fingerprint"][:7] for one in rest} == {"v0.0.1-"}
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert answers() == expected["v0.0.2"]
        wait_until(lambda: gc.collect() >= 0 and first() is None)  # only one is in memory
        switch("v0.0.3")
        wait_until(lambda: server.get("/health").json()["refused"] == "v0.0.3")
        assert server.get("/health").json()["version"] == "v0.0.2"
        assert answers() == expected["v0.0.2"]
        switch("v0.0.1")
        wait_until(lambda: server.get("/health").json()["version"] == "v0.0.1")
        assert server.get("/health").json()["refused"] is None
        assert answers() == expected["v0.0.1"]


def test_decisions_are_logged_without_texts_and_files_do_not_grow(
    data: Path, tmp_path: Path
) -> None:
    log = tmp_path / "logs/decisions.jsonl"
    with running(data, log=log, max_log_mib=0.0005) as server:
        for _ in range(4):
            server.post(CHAT, chat("say red"))
        server.post(CHAT, chat("say red", model="base"))
    files = sorted(log.parent.iterdir())
    assert len(files) > 1
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(rows) == 4  # what names its adapters is not routed
    assert all(row["system"] == "dlp_mlp" and "text" not in row for row in rows)
    assert not any("say red" in file.read_text() for file in files)
    assert all(file.stat().st_size < 1500 for file in files)


def test_figures_count_requests_tokens_and_adapters(data: Path) -> None:
    with running(data) as server:
        one = server.post(CHAT, chat()).json()
        server.post(CHAT, chat(model="colours"))
        server.post(CHAT, chat(max_tokens=1000))
        lines = server.get("/metrics").text.splitlines()
    found = {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines)
        if name[:1] != "#"
    }
    assert found["dlplora_requests_running"] == 0
    assert found["dlplora_time_to_first_token_seconds_count"] == 2
    assert found["dlplora_prompt_tokens_total"] == 2 * one["usage"]["prompt_tokens"]
    assert found['dlplora_requests_finished_total{reason="error"}'] == 1
    assert found['dlplora_adapter_requests_total{adapter="colours"}'] >= 1
    assert any(name.startswith("dlplora_confidence_bucket") for name in found)


@pytest.mark.usefixtures("slow")
def test_what_runs_too_long_after_a_switch_is_told_so(data: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        write_version(data, tmp_path / f"v0.0.{number}", number)
    current = tmp_path / "current"
    current.symlink_to("v0.0.1")
    with (
        running(current, systems=["dlp_mlp"], drain_seconds=0.2) as server,
        streaming(server) as lines,
    ):
        current.unlink()
        current.symlink_to("v0.0.2")
        told = [line for line in lines if line][-1]
    assert "another version has taken over" in told


def test_an_engine_that_fails_is_unhealthy_and_ends_the_server(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlplora.serving.server._DEAD_SECONDS", 3.0)

    def fail(_: Scheduler) -> None:
        raise MemoryError("secret of the machine")

    def ask_one_that_fails() -> None:
        with running(data) as server:
            assert server.post(CHAT, chat()).status_code == 200
            monkeypatch.setattr(Scheduler, "step", fail)
            for _ in range(3):
                reply = server.post(CHAT, chat())
                assert reply.status_code == 503
                assert "secret" not in reply.text
            assert server.get("/health").status_code == server.get("/ready").status_code == 503
            wait_until(lambda: not is_listening(server.url))

    with pytest.raises(ServerError, match="the engine has failed"):
        ask_one_that_fails()


def is_listening(url: str) -> bool:
    try:
        httpx.get(f"{url}/health")
    except httpx.TransportError:
        return False
    return True


@pytest.mark.parametrize("place", ["_begin", "_write_batch"])
def test_a_batch_that_fails_ends_alone(
    data: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    whole = getattr(Scheduler, place)
    left = [1]

    def fail_once(self: Scheduler, *arguments: Any) -> Any:
        found = whole(self, *arguments)
        if left:
            left.pop()
            raise MemoryError("out of memory")
        return found

    with running(data) as server:
        monkeypatch.setattr(Scheduler, place, fail_once)
        assert server.post(CHAT, chat()).status_code == 500
        assert server.post(CHAT, chat()).status_code == 200
        assert num_open(server) == 0


def test_an_address_in_use_is_told() -> None:
    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with pytest.raises(ServerError, match=rf"127\.0\.0\.1:{port} cannot be listened on"):
        listen("127.0.0.1", port)
    taken.close()


@pytest.mark.parametrize("second", [False, True])
def test_sigterm_lets_answers_end_and_a_second_one_does_not(data: Path, second: bool) -> None:
    words = [sys.executable, "-m", "dlplora.cli", "serve", "--model", str(data), "--port", "0"]
    words += ["--no-log", "--dtype", "float32", "--system", "dlp_mlp"]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            url = line.split(" answers at ")[1].split("/v1")[0]
            with (
                httpx.Client(timeout=60) as client,
                client.stream("POST", f"{url}{CHAT}", json=chat(**LONG, stream=True)) as reply,
            ):
                lines = reply.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                if second:
                    time.sleep(0.2)
                    process.send_signal(signal.SIGTERM)
                else:
                    wait_until(lambda: refuses(url))
                told = [line for line in received(lines) if line]
                assert (told[-1:] == ["data: [DONE]"]) == (not second)
            assert process.wait(20) == (1 if second else 0)
        finally:
            process.kill()


def received(lines: Iterator[str]) -> Iterator[str]:
    """Yield what comes before a connection breaks."""
    with suppress(httpx.RemoteProtocolError):
        yield from lines


def refuses(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 503
    except httpx.TransportError:
        return True


def test_what_is_wrong_with_the_command_is_one_line(data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="can be reached from other machines"):
        serve(model=data, host="0.0.0.0", no_log=True)
    with pytest.raises(KeysError, match="the keys cannot be read"):
        serve(model=data, keys=tmp_path / "gone", no_log=True)
    words = [sys.executable, "-m", "dlplora.cli", "serve", "--no-log", "--port", "0"]
    found = subprocess.run(
        [*words, "--model", str(data), "--system", "gone"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1
    assert found.stderr.startswith("error: params.yaml: no systems.gone; there are:")
    assert found.stderr.count("\n") == 1
