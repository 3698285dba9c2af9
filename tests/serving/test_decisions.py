"""Routes and scores of options that the server tells, beside the engine's own and the commands'."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from dlplora import cli
from dlplora.errors import GenerationError
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.records.scores import OptionScores
from dlplora.serving import decisions
from dlplora.serving.bodies import ScoreBody
from dlplora.serving.keys import Keys
from dlplora.serving.models import ServedModel
from dlplora.serving.schemas import ScoreReply
from dlplora.systems.engine import Engine
from dlplora.systems.load import Systems
from tests.serving.running import PLACE, SETTINGS, Running, running, write_version

ROUTE, SCORE, CHAT = "/v1/route", "/v1/score", "/v1/chat/completions"
TEXTS = ["what is the opposite of up ?", "say red", "which colour : two a b c d ?"]
PROMPT, OPTIONS = TEXTS[0], ["red", "down left", "no", "five"]
ADMIN = {"Authorization": f"Bearer {'a' * 20}"}
KINDS = ["dlp_mlp", "logo", "uniform", "fused", "joined", "weighed_experts", "arrow"]


@pytest.fixture(scope="module")
def all_kinds(data: Path) -> Iterator[Running]:
    """A server of systems of all kinds over the same data."""
    with running(data, systems=[*KINDS, "single:opposites"]) as server:
        yield server


def approximately(told: Any) -> Any:
    """Return what equals a reply's JSON up to rounding."""
    if isinstance(told, dict):
        return {key: approximately(value) for key, value in told.items()}
    if isinstance(told, list):
        return [approximately(value) for value in told]
    return pytest.approx(told, abs=1e-5) if isinstance(told, float) else told


def told_route(route: Route) -> dict[str, Any]:
    adapters = None if route.per_token else dict(route.mix)
    return {"adapters": adapters, "confidence": route.confidence}


def told_options(scores: OptionScores) -> list[dict[str, Any]]:
    rows = zip(scores.options, scores.logprobs, scores.tokens, scores.bytes, strict=True)
    return [dict(zip(("option", "logprob", "tokens", "bytes"), row, strict=True)) for row in rows]


@pytest.mark.parametrize("name", [*KINDS, "single:opposites"])
def test_routes_are_those_that_a_system_chooses(all_kinds: Running, data: Path, name: str) -> None:
    system = Systems(data, [name], place=PLACE).named(name)
    with system.running(fallback_below=system.fallback_below) as runner:
        routes = runner.route(TEXTS)
    expected = {
        "model": name,
        "system_fingerprint": all_kinds.server.api.models.current.fingerprint,
        "data": [
            told_route(route) | {"probabilities": system.probabilities(text)}
            for route, text in zip(routes, TEXTS, strict=True)
        ],
        "fallback_below": 0.0,
    }
    found = all_kinds.post(ROUTE, {"model": name, "texts": TEXTS}).json()
    assert found == approximately(expected)
    assert list(found) == list(expected)


@pytest.mark.parametrize("name", [*KINDS, "single:opposites"])
def test_options_are_weighed_as_a_system_does(all_kinds: Running, data: Path, name: str) -> None:
    with Engine.load(data, system=name, place=PLACE) as engine:
        (route,) = engine.route([PROMPT])
        scores = engine.score(PROMPT, OPTIONS, route=route)
    found = all_kinds.post(SCORE, {"model": name, "prompt": PROMPT, "options": OPTIONS}).json()
    expected = {
        "model": name,
        "system_fingerprint": all_kinds.server.api.models.current.fingerprint,
        "best": scores.best,
        "options": told_options(scores),
        "route": told_route(route),
    }
    assert found == approximately(expected)
    assert list(found) == list(expected)


@pytest.mark.parametrize(
    ("body", "route"),
    [
        ({"model": "colours"}, Route(("colours",), (1.0,))),
        ({"model": "base"}, BASE_ROUTE),
        ({"model": "logo", "lora": {"colours": 0.5, "opposites": -1.5}},
         Route(("colours", "opposites"), (0.5, -1.5))),
    ],
)  # fmt: skip
def test_options_are_weighed_by_an_adapter_the_base_model_or_a_mix(
    server: Running, engine: Engine, body: dict[str, Any], route: Route
) -> None:
    if "lora" in body:
        body = body | {"lora": [{"id": k, "scale": v} for k, v in body["lora"].items()]}
    found = server.post(SCORE, body | {"prompt": PROMPT, "options": OPTIONS}).json()
    scores = engine.score(PROMPT, OPTIONS, route=route)
    assert found["options"] == approximately(told_options(scores))
    assert (found["best"], found["route"]) == (scores.best, told_route(route))


def test_the_commands_tell_the_same(
    server: Running,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*words: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["dlplora", *words, "--json", "--data", str(data)])
        with pytest.raises(SystemExit):
            cli.main()
        return json.loads(capsys.readouterr().out)

    for least in ({}, {"fallback_below": 1.0}):
        threshold = ["--fallback-below", "1.0"] if least else []
        found = server.post(ROUTE, {"texts": [PROMPT]} | least).json()
        expected = command("route", PROMPT, *threshold)
        row = told_route(
            Route(
                **{k: tuple(v) if isinstance(v, list) else v for k, v in expected["route"].items()}
            )
        )
        assert found["data"] == [approximately(row | {"probabilities": expected["probabilities"]})]
        assert found["fallback_below"] == expected["fallback_below"]
        options = [word for option in OPTIONS for word in ("--option", option)]
        expected = command("score", PROMPT, *options, *threshold)
        scored = server.post(SCORE, {"prompt": PROMPT, "options": OPTIONS} | least).json()
        assert scored["best"] == expected["best"]
        assert scored["route"] == approximately(row)
        for key, name in (("logprob", "logprobs"), ("tokens", "tokens"), ("bytes", "bytes")):
            assert [one[key] for one in scored["options"]] == approximately(expected[name])


def test_what_falls_back_is_told_with_its_confidence(server: Running, engine: Engine) -> None:
    (sure,) = engine.route([PROMPT])
    found = server.post(ROUTE, {"texts": [PROMPT], "fallback_below": 1.0}).json()
    assert found["data"][0]["adapters"] == {}
    assert found["data"][0]["confidence"] == pytest.approx(sure.confidence)
    assert found["fallback_below"] == 1.0
    body = {"prompt": PROMPT, "options": OPTIONS, "fallback_below": 1.0}
    expected = engine.score(PROMPT, OPTIONS, route=BASE_ROUTE)
    scored = server.post(SCORE, body).json()
    assert scored["options"] == approximately(told_options(expected))


def test_a_name_that_is_no_system_is_told(engine: Engine) -> None:
    for ask in (engine.runner_of, engine.fallback_of, lambda name: engine.probabilities(name, [])):
        with pytest.raises(GenerationError, match="no system 'gone'; there are: dlp_mlp, logo"):
            ask("gone")


def test_a_score_that_is_not_finite_is_null(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Engine.score

    def endless(*arguments: Any, **more: Any) -> OptionScores:
        found = score(*arguments, **more)
        return replace(found, logprobs=(float("-inf"), *found.logprobs[1:]))

    monkeypatch.setattr(Engine, "score", endless)
    found = server.post(SCORE, {"model": "base", "prompt": PROMPT, "options": OPTIONS}).json()
    assert [one["logprob"] is None for one in found["options"]] == [True, False, False, False]


def test_decisions_beside_running_chats_are_those_alone(server: Running) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    for model in ("dlp_mlp", "logo", "single:opposites"):
        asked += [(ROUTE, {"model": model, "texts": TEXTS})]
        asked += [(SCORE, {"model": model, "prompt": text, "options": OPTIONS}) for text in TEXTS]
        for text in TEXTS:
            messages = [{"role": "user", "content": text}]
            asked += [(CHAT, {"model": model, "messages": messages, "max_tokens": 12})]

    def ask(one: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        told: dict[str, Any] = server.post(*one).json()
        return {key: told[key] for key in told if key not in ("id", "created", "usage")}

    alone = [ask(one) for one in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, asked * 3))
    assert together == approximately(alone * 3)


class Gate:
    """Holds scores back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.num_begun = 0
        monkeypatch.setattr("dlplora.serving.app.score_options", self._score)

    def _score(self, body: ScoreBody, served: ServedModel) -> ScoreReply:
        self.num_begun += 1
        assert self.opened.wait(30)
        return decisions.score_options(body, served)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def score(**more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "options": OPTIONS} | more


@contextmanager
def scoring(server: Running, count: int) -> Iterator[list[Future[httpx.Response]]]:
    """Ask for scores that the gate holds back."""
    calls = server.server.api.models.current.calls
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(server.post, SCORE, score())]
        wait_until(lambda: calls.num_open == 1)
        asked += [pool.submit(server.post, SCORE, score()) for _ in range(count - 1)]
        wait_until(lambda: calls.num_open == count)
        yield asked


def test_a_full_queue_is_told_and_answers_go_on(data: Path, gate: Gate) -> None:
    with running(data, max_batch_size=1, max_queue=1) as server, scoring(server, 2) as asked:
        for path, body in ((SCORE, score()), (ROUTE, {"texts": TEXTS})):
            reply = server.post(path, body)
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
            assert reply.json()["error"]["code"] == "queue_full"
        chat = {"messages": [{"role": "user", "content": "say red"}], "max_tokens": 2}
        assert server.post(CHAT, chat).status_code == 200
        assert gate.num_begun == 1
        gate.opened.set()
        assert [one.result().status_code for one in asked] == [200, 200]


def test_a_call_that_waits_is_dropped_when_its_client_goes_or_it_takes_too_long(
    data: Path, gate: Gate
) -> None:
    bounds = replace(SETTINGS.bounds, seconds=3.0)
    with running(data, bounds=bounds) as server, scoring(server, 1) as asked:
        calls = server.server.api.models.current.calls
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}{SCORE}", json=score(), timeout=0.3)
        wait_until(lambda: calls.num_open == 1)
        late = server.post(SCORE, score())
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert asked[0].result().status_code == 504
        gate.opened.set()
        wait_until(lambda: calls.num_open == 0)
        assert gate.num_begun == 1
        assert server.post(SCORE, score()).status_code == 200


@pytest.mark.parametrize("is_in_time", [True, False])
def test_a_score_that_runs_ends_on_the_version_that_it_began_with(
    data: Path, tmp_path: Path, gate: Gate, is_in_time: bool
) -> None:
    expected = {}
    for number in (1, 2):
        write_version(data, tmp_path / f"v0.0.{number}", number)
        with Engine.load(tmp_path / f"v0.0.{number}", system="dlp_mlp", place=PLACE) as engine:
            (route,) = engine.route([PROMPT])
            expected[number] = told_options(engine.score(PROMPT, OPTIONS, route=route))
    assert expected[1] != expected[2]
    current = tmp_path / "current"
    current.symlink_to("v0.0.1")
    drain_seconds = 30.0 if is_in_time else 0.2
    with running(current, systems=["dlp_mlp"], drain_seconds=drain_seconds) as server:
        old = server.server.api.models.current
        with scoring(server, 2) as asked:
            (tmp_path / "next").symlink_to("v0.0.2")
            os.replace(tmp_path / "next", current)
            wait_until(lambda: server.server.api.models.current is not old)
            routed = server.post(ROUTE, {"texts": TEXTS}).json()
            assert routed["system_fingerprint"].startswith("v0.0.2-")
            if not is_in_time:  # those that wait end, what runs does not
                wait_until(asked[1].done)
            gate.opened.set()
            first, second = (one.result() for one in asked)
        assert first.json()["system_fingerprint"] == old.fingerprint
        assert first.json()["options"] == approximately(expected[1])
        assert second.status_code == (200 if is_in_time else 503)
        if is_in_time:
            assert second.json()["options"] == approximately(expected[1])
        else:
            assert "another version has taken over" in second.json()["error"]["message"]
        wait_until(lambda: not server.server.api.models._retiring)
        found = server.post(SCORE, score()).json()
        assert found["options"] == approximately(expected[2])


def test_a_server_that_drains_decides_nothing_new(data: Path, gate: Gate) -> None:
    with running(data) as server, scoring(server, 1) as asked:
        server.server.handle_exit(15, None)
        for path, body in ((SCORE, score()), (ROUTE, {"texts": TEXTS})):
            reply = httpx.post(f"{server.url}{path}", json=body)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
        gate.opened.set()
        assert asked[0].result().status_code == 200


def test_an_adapter_that_was_unloaded_is_routed_to_and_scores_nothing(data: Path) -> None:
    with running(data, keys=Keys(admin=(b"a" * 20,)), systems=["single:opposites"]) as server:
        unload = {"lora_name": "opposites"}
        server.post("/v1/unload_lora_adapter", unload, headers=ADMIN)
        found = server.post(ROUTE, {"texts": [PROMPT]}).json()
        assert found["data"][0]["adapters"] == {"opposites": 1.0}
        reply = server.post(SCORE, score())
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "adapter_unavailable")


def test_decisions_are_logged_as_those_of_answers_are(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "logs/decisions.jsonl"
    with running(data, log=log) as server:
        routed = server.post(ROUTE, {"texts": TEXTS}).json()
        server.post(SCORE, score())
        server.post(SCORE, score(model="colours"))  # nothing is decided
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == len(TEXTS) + 1
    for row, told in zip(rows, routed["data"], strict=False):
        assert dict(zip(row["adapters"], row["weights"], strict=True)) == told["adapters"]
