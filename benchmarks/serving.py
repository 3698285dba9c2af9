"""Our server beside others on the same machine: requests a second, and how long clients wait.

    python -m benchmarks.serving [--data data] [--rivals ours,peft,transformers,llama]
        [--requests 48] [--rounds 3] [--device cpu|cuda]

Held-out questions of all tasks in turn, as chats with an empty system turn, 24 tokens each
whatever they say. 1, 4 and 16 clients ask at once, each again as soon as it has its answer. `ours`
and `peft` answer each by its own task's adapter, `llama` all by one, `transformers` by the base
model alone (which may end earlier: seconds a token count). `bare` is our engine without a server,
in this process, and all clients share its cores with the servers. The package of `llama` computes
on the CPU wherever it runs. PEFT's answers come whole, so that
its first token is its last. All take turns, round by round; figures are medians over rounds.

Writes benchmarks/results/serving.json. Needs a finished pipeline of the suite `default` and, for
the rivals, `pip install -e '.[bench]'`.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import httpx

from benchmarks.devices import add_device, chosen_place
from benchmarks.record import write_results
from benchmarks.serving_rivals import BATCH
from dlplora import Engine, Message, Request, Route, Sampling
from dlplora.params.load import load_params
from dlplora.records.examples import examples_path, read_examples
from dlplora.stage import progress

CLIENTS = (1, 4, 16)
NUM_TOKENS = 24
FIRST_PORT = 8101
VERSIONS = ("torch", "transformers", "peft", "fastapi", "uvicorn", "xllamacpp")


@dataclass(frozen=True)
class Question:
    """A question and its task."""

    text: str
    task: str


@dataclass(frozen=True)
class Timed:
    """Seconds of one answer: to its first text, to its end; and its tokens."""

    first: float
    whole: float
    num_tokens: int


def questions_of(data: Path) -> list[Question]:
    """Return all held-out questions, the tasks in turn."""
    params = load_params(data.parent / "params.yaml")
    rows = [
        [
            Question(example.question, task)
            for example in read_examples(examples_path(data / "examples", "test", task))
        ]
        for task in sorted(params.tasks)
    ]
    return [question for turn in zip_longest(*rows) for question in turn if question]


async def ask(client: httpx.AsyncClient, question: Question, model: str) -> Timed:
    """Stream one answer."""
    body = {
        "model": model,
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": question.text},
        ],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if model not in ("base", "transformers"):
        body["ignore_eos"] = True
    if model == "transformers":
        del body["model"]
    begun, first, num_tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise RuntimeError((await reply.aread()).decode())
        async for line in reply.aiter_lines():
            if "{" not in line:
                continue
            event = json.loads(line.removeprefix("data: "))
            if any((one.get("delta") or {}).get("content") for one in event.get("choices", [])):
                first = first or time.perf_counter() - begun
                num_tokens += 1
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    return Timed(first, time.perf_counter() - begun, num_tokens)


async def load(
    url: str, kind: str, questions: Sequence[Question], clients: int
) -> dict[str, float]:
    """Let clients ask all questions; return what they saw."""
    left = iter(questions)
    timed: list[Timed] = []

    async def work(client: httpx.AsyncClient) -> None:
        for question in left:
            model = question.task if kind in ("ours", "peft") else kind
            timed.append(await ask(client, question, model))

    limits = httpx.Limits(max_keepalive_connections=0)  # llama.cpp's server closes them
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        begun = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        seconds = time.perf_counter() - begun
    between = [
        (one.whole - one.first) / (one.num_tokens - 1) for one in timed if one.num_tokens > 1
    ]
    return {
        "requests_per_second": len(timed) / seconds,
        "tokens_per_second": sum(one.num_tokens for one in timed) / seconds,
        "first_token_seconds": statistics.median(one.first for one in timed),
        "between_tokens_seconds": statistics.median(between),
    }


def bare(engine: Engine, questions: Sequence[Question], clients: int) -> dict[str, float]:
    """Answer all questions by the engine alone, as many at once as there would be clients."""
    scheduler = engine.scheduler()
    requests = iter(
        [
            Request(
                (Message("system", ""), Message("user", question.text)),
                Sampling(max_new_tokens=NUM_TOKENS, ignore_eos=True),
                (Route((question.task,), (1.0,)),),
                policy="route_once",
            )
            for question in questions
        ]
    )
    begun, num_tokens = time.perf_counter(), 0
    for request in islice(requests, clients):
        scheduler.add(request)
    while not scheduler.is_idle:
        for piece in scheduler.step():
            if piece.error is not None:
                raise piece.error
            if piece.answer is not None:
                num_tokens += piece.answer.num_tokens
                for request in islice(requests, 1):
                    scheduler.add(request)
    seconds = time.perf_counter() - begun
    return {
        "requests_per_second": len(questions) / seconds,
        "tokens_per_second": num_tokens / seconds,
    }


def start(
    kind: str, port: int, data: Path, wheel: Path | None, log: Path
) -> subprocess.Popen[bytes]:
    """Start a server and wait until it has answered once."""
    words = [sys.executable, "-m", "benchmarks.serving_rivals", kind, "--port", str(port)]
    words += ["--data", str(data), *(["--wheel", str(wheel)] if wheel else [])]
    with log.open("wb") as written:
        process = subprocess.Popen(words, stdout=written, stderr=subprocess.STDOUT)
    question = Question("say hello", "")
    for _ in range(240):
        try:
            asyncio.run(
                load(
                    f"http://127.0.0.1:{port}",
                    "base" if kind != "transformers" else kind,
                    [question],
                    1,
                )
            )
        except (httpx.HTTPError, RuntimeError, statistics.StatisticsError):
            time.sleep(0.5)
        else:
            return process
        if process.poll() is not None:
            break
    process.kill()
    raise SystemExit(f"{kind} does not answer: see {log}")


def main() -> None:
    """Measure and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rivals", default="ours,peft,transformers,llama")
    parser.add_argument("--requests", type=int, default=48, help="Of each number of clients.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--wheel", type=Path, default=None)
    add_device(parser)
    options = parser.parse_args()
    kinds = options.rivals.split(",")
    questions = iter(questions_of(options.data))
    logs = Path(".scratch")
    logs.mkdir(exist_ok=True)
    place = chosen_place(options.device)  # the servers that are started have no choice then
    engine = Engine.load(
        options.data, system="ensemble", place=place, max_batch_size=BATCH, fallback_below=0.0
    )
    processes = []
    found: dict[str, dict[int, list[dict[str, float]]]] = {
        kind: {clients: [] for clients in CLIENTS} for kind in ["bare", *kinds]
    }
    try:
        for number, kind in enumerate(kinds):
            log = logs / f"serving-{kind}.log"
            processes.append(start(kind, FIRST_PORT + number, options.data, options.wheel, log))
        with progress("serving", total=options.rounds * len(CLIENTS) * len(found)) as advance:
            for _ in range(options.rounds):
                for clients in CLIENTS:
                    count = options.requests if clients > 1 else options.requests // 4
                    asked = list(islice(questions, count))  # others each time: none is known yet
                    for kind in found:
                        if kind == "bare":
                            seen = bare(engine, asked, clients)
                        else:
                            url = f"http://127.0.0.1:{FIRST_PORT + kinds.index(kind)}"
                            seen = asyncio.run(load(url, kind, asked, clients))
                        found[kind][clients].append(seen)
                        advance(1, kind=kind, requests=round(seen["requests_per_second"], 2))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told: dict[str, Any] = {
        kind: {
            str(clients): {
                name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]
            }
            for clients, rows in by_clients.items()
        }
        for kind, by_clients in found.items()
    }
    ratios = [
        ours["requests_per_second"] / alone["requests_per_second"]
        for ours, alone in zip(found["ours"][16], found["bare"][16], strict=True)
    ]
    told["ours_to_bare_at_16"] = round(statistics.median(ratios), 3)
    write_results(
        "serving",
        {"requests": options.requests, "tokens": NUM_TOKENS, **told},
        place=place,
        rounds=options.rounds,
        libraries=VERSIONS,
    )


if __name__ == "__main__":
    main()
