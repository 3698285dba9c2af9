"""Thousands of mixed requests to a server: each answer is that of its request alone.

    python -m benchmarks.serving_soak [--requests 10000] [--clients 16] [--switch-seconds 60]
        [--device cpu|cuda]

A tiny model in float32, served by a process of its own on 127.0.0.1. Clients ask at once: systems,
adapters and mixes, chats and completions, whole and as streams, some of which they leave or give
up, and bodies that are wrong. An administrator loads and unloads an adapter, and the model is
switched between two versions. Every greedy answer has to be the one that its request gets alone
from the version that its fingerprint names; where two tokens are nearly as likely a request is left
out, because the order of sums decides between them. The memory of the last quarter may exceed that
of the second by 3 % at most. At last the server is killed: clients get an error of the connection,
and once it is started again it answers.

Writes benchmarks/results/serving_soak.json.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.devices import add_device, chosen_place
from benchmarks.record import write_results
from dlplora.engine.answers import Answer
from dlplora.engine.requests import Request
from dlplora.errors import DlpLoraError
from dlplora.params.project import Runtime
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.runtime import Place, set_up
from dlplora.serving.bodies import ChatBody, CompletionBody
from dlplora.systems.engine import Engine
from tests.answering import write_answering_project
from tests.device import choose_device
from tests.peft_adapters import peft_pool
from tests.project import ROOT
from tests.serving.running import write_version
from tests.tiny import TARGETS, WORDS, tiny_model

SYSTEMS = ("dlp_mlp", "single:opposites", "logo")
MODELS = (*SYSTEMS, "base", "colours", "opposites")
VERSIONS = ("v0.0.1", "v0.0.2")
KEY = "a" * 20
MARGIN = 1e-3  # between the two likeliest tokens
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
SAY_RED = {"messages": [{"role": "user", "content": "say red"}]}
BAD: list[tuple[dict[str, Any], int]] = [
    ({"messages": []}, 400),
    (SAY_RED | {"model": "none"}, 404),
    (SAY_RED | {"max_tokens": 10_000}, 400),
    (SAY_RED | {"tools": []}, 400),
    (SAY_RED | {"lora": [{"id": "x", "scale": 1}]}, 404),
]


def body_of(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Draw a path and a body that can be answered greedily."""
    words = [word for word in WORDS if word.isalpha()]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    told: dict[str, Any] = {
        "model": draw.choice(MODELS),
        "max_tokens": draw.randint(1, 16),
        "stop": draw.choice([None, None, draw.choice(words)]),
        "frequency_penalty": draw.choice([0.0, 0.0, 0.5]),
        "n": draw.choice([1, 1, 1, 2]),
    }
    if draw.random() < 0.2:
        scales = draw.choice([(0.5, 0.5), (1.0, -0.5), (0.25, 1.5)])
        names = ("colours", "opposites")
        told["lora"] = [{"id": n, "scale": s} for n, s in zip(names, scales, strict=True)]
    if draw.random() < 0.3:
        prompts = [text(draw.choice([8, 60])) for _ in range(draw.choice([1, 1, 3]))]
        return COMPLETE, told | {"prompt": prompts}
    messages = [{"role": "user", "content": text(draw.choice([8, 8, 60]))}]
    if draw.random() < 0.3:
        messages += [
            {"role": "assistant", "content": text(6)},
            {"role": "user", "content": text(8)},
        ]
    return CHAT, told | {"messages": messages}


def texts_alone(engine: Engine, path: str, body: dict[str, Any]) -> list[str] | None:
    """Return the texts that a body gets alone; None if two tokens are nearly as likely."""
    model = body["model"]
    told: dict[str, Any] = {"system": model}
    kind = ChatBody if path == CHAT else CompletionBody
    parsed = kind.model_validate(body)
    if parsed.route is not None or model not in SYSTEMS:
        named = BASE_ROUTE if model == "base" else Route((model,), (1.0,))
        told = {"routes": (parsed.route or named,), "policy": "route_once"}
        told |= {"system": model if model in SYSTEMS else None}
    found: list[str] = []
    for request in parsed.requests(body["max_tokens"], **told):
        scored = request.changed(logprobs=2, echo=False)
        assert isinstance(scored, Request)
        answers: list[Answer] = engine.generate([scored])
        tops = [score.top for answer in answers for score in answer.tokens]
        if any(top[0].logprob - top[1].logprob <= MARGIN for top in tops if len(top) > 1):
            return None
        found += [answer.text for answer in answers]
    return found


class Soak:
    """What the clients share: bodies with their texts by version, and what happened."""

    def __init__(self, folder: Path, seed: int, place: Place) -> None:
        write_answering_project(ROOT, folder)
        self.folder, self._place = folder, place
        for name, number in zip(VERSIONS, (3, 4), strict=True):
            write_version(folder / "data", folder / name, number)
        configs = {"guest": {"r": 2, "target_modules": TARGETS["llama"]}}
        peft_pool(tiny_model(seed=9), configs, folder / "adapters")
        self.happened: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.bodies = self._some_bodies(random.Random(seed), 200)

    def _some_bodies(
        self, draw: random.Random, count: int
    ) -> list[tuple[str, dict[str, Any], dict[str, list[str]]]]:
        drawn = [body_of(draw) for _ in range(2 * count)]
        texts: dict[str, list[list[str] | None]] = {}
        first, *others = SYSTEMS
        for version in VERSIONS:
            with Engine.load(
                self.folder / version, system=first, systems=others, place=self._place, cache_mib=0
            ) as engine:
                texts[version] = [_quiet(engine, path, body) for path, body in drawn]
        found = []
        for place, (path, body) in enumerate(drawn):
            own = {version: texts[version][place] for version in VERSIONS}
            if all(one is not None for one in own.values()):
                found.append((path, body, {k: v for k, v in own.items() if v is not None}))
        return found[:count]

    def note(self, what: str, wrong: str | None = None) -> None:
        """Count what happened, and keep what was wrong."""
        self.happened[what] += 1
        if wrong is not None:
            self.wrong.append(wrong)

    async def ask(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        """Send one request of any kind and check what comes back."""
        kind = draw.random()
        if kind < 0.05:
            body, status = draw.choice(BAD)
            reply = await client.post(CHAT, json=body)
            is_right = reply.status_code == status and "error" in reply.json()
            self.note("refused", None if is_right else f"{reply.status_code}: {body}")
        elif kind < 0.10:
            reply = await client.post(CHAT, json={**SAY_RED, "model": "guest"})
            is_right = reply.status_code in (200, 404, 409)
            self.note(f"guest {reply.status_code}", None if is_right else reply.text)
        else:
            path, body, texts = draw.choice(self.bodies)
            if kind < 0.20:
                await self._leave(client, path, body, draw)
            elif kind < 0.55:
                await self._stream(client, path, body, texts)
            else:
                reply = await client.post(path, json=body)
                if reply.status_code != 200:
                    self.note("failed", reply.text)
                    return
                self._check("whole", reply.json(), texts, body)

    def _check(
        self, kind: str, told: dict[str, Any], texts: dict[str, list[str]], body: dict[str, Any]
    ) -> None:
        version = told["system_fingerprint"].rpartition("-")[0]
        found = [
            choice["message"]["content"] if "message" in choice else choice["text"]
            for choice in told["choices"]
        ]
        is_right = found == texts[version]
        self.note(kind, None if is_right else f"{found} is not {texts[version]}: {body}")

    async def _stream(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: dict[str, Any],
        texts: dict[str, list[str]],
    ) -> None:
        found: dict[int, str] = {}
        fingerprint = last = ""
        async with client.stream("POST", path, json={**body, "stream": True}) as reply:
            async for line in reply.aiter_lines():
                last = line or last
                if "{" not in line:
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.note("failed", line)
                    return
                fingerprint = event["system_fingerprint"]
                for choice in event["choices"]:
                    told = choice["delta"].get("content") if "delta" in choice else choice["text"]
                    found[choice["index"]] = found.get(choice["index"], "") + (told or "")
        expected = texts[fingerprint.rpartition("-")[0]]
        is_right = [text for _, text in sorted(found.items())] == expected
        is_right = is_right and last == "data: [DONE]"
        self.note("streamed", None if is_right else f"{found} is not {expected}: {body}")

    async def _leave(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any], draw: random.Random
    ) -> None:
        """Leave a stream after its first text, or give up an answer that takes long."""
        long = {**body, "max_tokens": 100, "ignore_eos": True, "stop": None}
        if path == COMPLETE:
            long["prompt"] = long["prompt"][:1]
        if draw.random() < 0.5:
            async with client.stream("POST", path, json={**long, "stream": True}) as reply:
                await anext(reply.aiter_lines())
            self.note("left")
            return
        try:
            await client.post(path, json=long, timeout=draw.random() * 0.1)
            self.note("answered in time")
        except httpx.TimeoutException:
            self.note("given up")


def _quiet(engine: Engine, path: str, body: dict[str, Any]) -> list[str] | None:
    try:
        return texts_alone(engine, path, body)
    except DlpLoraError:  # too long a prompt
        return None


def start(folder: Path, port: int) -> subprocess.Popen[str]:
    """Start the server and wait until it answers."""
    words = [sys.executable, "-m", "dlplora.cli", "serve", "--model", str(folder / "current")]
    words += [word for name in SYSTEMS for word in ("--system", name)]
    words += ["--port", str(port), "--dtype", "float32", "--max-batch-size", "16"]
    words += ["--admin-keys", str(folder / "admin"), "--adapters-from", str(folder / "adapters")]
    words += ["--log", str(folder / "decisions.jsonl"), "--max-log-mib", "1"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, text=True)
    for _ in range(600):
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.1)
        if process.poll() is not None:
            raise RuntimeError("the server has not started")
    raise RuntimeError("the server does not answer")


def switch(folder: Path, version: str) -> None:
    """Let `current` point to a version."""
    (folder / "next").symlink_to(version)
    os.replace(folder / "next", folder / "current")


async def load(
    soak: Soak, url: str, count: int, clients: int, seconds: float, pid: int
) -> list[float]:
    """Send so many requests, while adapters and versions change; return the server's memory."""
    rss_mib: list[float] = []
    left = iter(range(count))
    ended = asyncio.Event()

    async def work(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for _ in left:
                await soak.ask(client, draw)

    async def administrate() -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=url, timeout=60, headers=headers) as client:
            while not ended.is_set():
                body = {"lora_name": "guest", "lora_path": "guest", "load_inplace": True}
                reply = await client.post("/v1/load_lora_adapter", json=body)
                soak.note("loaded", None if reply.status_code == 200 else reply.text)
                await asyncio.sleep(0.3)
                body = {"lora_name": "guest"}
                reply = await client.post("/v1/unload_lora_adapter", json=body)
                # A switch in between may have dropped it.
                soak.note("unloaded", None if reply.status_code in (200, 404) else reply.text)
                await asyncio.sleep(0.1)

    async def switch_versions() -> None:
        number = 0
        while not ended.is_set():
            await asyncio.sleep(seconds)
            number += 1
            switch(soak.folder, VERSIONS[number % 2])
            soak.note("switched")

    async def watch() -> None:
        while not ended.is_set():
            rss_mib.append(psutil.Process(pid).memory_info().rss / 2**20)
            await asyncio.sleep(0.5)

    others = [asyncio.create_task(one()) for one in (administrate, switch_versions, watch)]
    await asyncio.gather(*(work(number) for number in range(clients)))
    ended.set()
    others[1].cancel()
    await asyncio.gather(*others, return_exceptions=True)
    return rss_mib


async def kill(soak: Soak, url: str, process: subprocess.Popen[str]) -> None:
    """Kill the server while clients wait; each has to get an error of the connection."""

    async def wait() -> None:
        body = {**SAY_RED, "max_tokens": 200, "ignore_eos": True}
        try:
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                while True:
                    await client.post(CHAT, json=body)
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
            soak.note("cut off")

    waiting = [asyncio.create_task(wait()) for _ in range(8)]
    await asyncio.sleep(1)
    process.send_signal(signal.SIGKILL)
    await asyncio.gather(*waiting)
    assert soak.happened["cut off"] == len(waiting)


def main() -> None:
    """Soak, check, write what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--switch-seconds", type=float, default=60)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)
    options = parser.parse_args()
    choose_device(chosen_place(options.device).device.type)
    place = set_up(Runtime(dtype="float32", threads=1), seed=0)
    folder = Path(tempfile.mkdtemp(prefix="serving-soak-"))
    url = f"http://127.0.0.1:{options.port}"
    try:
        soak = Soak(folder, options.seed, place)
        (folder / "admin").write_text(f"{KEY}\n")
        switch(folder, VERSIONS[0])
        process = start(folder, options.port)
        try:
            begun = time.monotonic()
            rss_mib = asyncio.run(
                load(
                    soak,
                    url,
                    options.requests,
                    options.clients,
                    options.switch_seconds,
                    process.pid,
                )
            )
            seconds = time.monotonic() - begun
            time.sleep(1)
            running = [
                line
                for line in httpx.get(f"{url}/metrics").text.splitlines()
                if "_running " in line
            ]
            assert running[-1].endswith(" 0.0"), running
            asyncio.run(kill(soak, url, process))
        finally:
            process.kill()
            process.wait()
        process = start(folder, options.port)
        asyncio.run(load(soak, url, 50, 4, 60, process.pid))
        process.terminate()
        assert process.wait(30) == 0
    finally:
        shutil.rmtree(folder)
    quarter = len(rss_mib) // 4
    second = statistics.median(rss_mib[quarter : 2 * quarter])
    last = statistics.median(rss_mib[3 * quarter :])
    found = {
        "requests": options.requests,
        "clients": options.clients,
        "seconds": round(seconds, 1),
        **dict(sorted(soak.happened.items())),
        "wrong": len(soak.wrong),
        "rss_mib_second_quarter": round(second, 1),
        "rss_mib_last_quarter": round(last, 1),
    }
    libraries = ("torch", "transformers", "fastapi", "uvicorn")
    write_results("serving_soak", found, place=place, rounds=1, libraries=libraries)
    assert not soak.wrong, soak.wrong[:5]
    assert last <= 1.03 * second, f"memory grew from {second:.1f} to {last:.1f} MiB"


if __name__ == "__main__":
    main()
