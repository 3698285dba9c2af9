"""Random requests for minutes: each answer is that of its request alone, and nothing is left over.

    python -m benchmarks.soak [--minutes 10] [--seed 0] [--device cpu|cuda]

A tiny model in float32. Three threads add requests to one scheduler – questions and chats, by a
router, by routes of their own, by a probe and by the base model, greedy, some with stop strings,
log-probabilities of prompt and answer, or several answers –, cancel some of them, and ask what
cannot be answered. Another thread lets an adapter come and go that some requests name. A fifth one
asks by itself. Every answer has to be the one that its request gets alone; a cancelled one has to
begin like it. Where two tokens are nearly as likely a request is left out, because the order of
sums decides between them. In the end nothing may be left, and the memory of the last quarter may
exceed that of the second by 3 % at most. Written to benchmarks/results/soak.json.
"""

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor

from benchmarks.devices import add_device, chosen_place
from benchmarks.record import write_results
from dlplora.adapters import read_adapter
from dlplora.engine.answers import Answer, Piece
from dlplora.engine.requests import Message, Request
from dlplora.engine.routing import RequestRouter
from dlplora.engine.runner import Runner
from dlplora.engine.scheduler import Scheduler
from dlplora.params.project import Runtime
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.routing.simple import ConstantRouter
from dlplora.runtime import set_up
from dlplora.sampling import Sampling
from tests.device import choose_device
from tests.engine.requests_of import BOTH, ByLength, pooled_base
from tests.peft_adapters import FINGERPRINT
from tests.tiny import WORDS

GONE = Route(("gone",), (1.0,))
MARGIN = 1e-3  # between the two likeliest tokens
MOST_WAITING = 40


@dataclass(frozen=True)
class ConstantProbe:
    """A probe that routes every prompt alike, whatever the base model makes of it."""

    path: str

    def routes(self, inputs_BI: Tensor) -> list[Route]:
        """Return one route for each prompt."""
        return [BOTH] * len(inputs_BI)


class Soak:
    """What the threads share: the engine, the requests with their answers alone, what happened."""

    def __init__(self, folder: Path, seed: int) -> None:
        base, pool, _ = pooled_base(folder)
        two = read_adapter(folder / "two", base_fingerprint=FINGERPRINT)
        self.guest = replace(two, name="guest")
        pool.add(self.guest)
        probe = ConstantProbe("model.layers.1.self_attn.q_proj")
        systems = {
            "base": RequestRouter(base, pool, ConstantRouter(BASE_ROUTE)),
            "probe": RequestRouter(base, pool, probe, "refill"),
        }
        told: dict[str, Any] = {"router": ByLength(), "systems": systems, "prefill_tokens": 24}
        self.runner = Runner(base, pool, cache_mib=2, **told)
        alone = Runner(base, pool, cache_mib=0, **told)
        self.requests = _some_requests(alone, random.Random(seed))
        self.scheduler: Scheduler = self.runner.scheduler()
        self.asked: dict[int, tuple[Request, list[Answer] | None]] = {}
        self.num_ended: Counter[int] = Counter()  # of the answers to each request
        self.happened: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.ended = threading.Event()
        self._noting = threading.Lock()

    def note(self, what: str, wrong: str | None = None) -> None:
        """Count what happened, and keep what was wrong."""
        with self._noting:
            self.happened[what] += 1
            if wrong is not None:
                self.wrong.append(wrong)

    def ask(self, draw: random.Random) -> None:
        """Add requests, some of which cannot be answered, and cancel some."""
        while not self.ended.is_set():
            if self.scheduler.num_waiting > MOST_WAITING:
                time.sleep(0.005)
                continue
            drawn, expected = draw.choice(self.requests)
            request, answers = replace(drawn), list(expected) or None  # to be cancelled by itself
            kind = draw.random()
            if kind < 0.05:
                bad: dict[str, Any] = draw.choice([{"routes": (GONE,)}, {"system": "none"}])
                request, answers = replace(request, **bad), None
            with self._noting:
                self.asked[self.scheduler.add(request)] = request, answers
                self.happened["requests"] += 1
            if 0.05 <= kind < 0.2:
                time.sleep(draw.random() * 0.02)
                request.cancel()

    def ask_alone(self, draw: random.Random) -> None:
        """Ask without the scheduler."""
        while not self.ended.is_set():
            request, answers = draw.choice(self.requests)
            if _guests(request):
                continue
            found = self.runner.generate([replace(request)])
            is_right = list(map(_essence, found)) == list(map(_essence, answers))
            self.note("alone", None if is_right else f"alone: {request}")
            time.sleep(draw.random() * 0.05)

    def come_and_go(self, draw: random.Random) -> None:
        """Take the guest out of the pool and put it in again."""
        while not self.ended.is_set():
            time.sleep(draw.random() * 0.05)
            self.runner.pool.remove("guest")
            time.sleep(draw.random() * 0.02)
            self.runner.pool.add(self.guest)
            self.note("guest came back")

    def check(self, piece: Piece) -> None:
        """Compare the end of an answer with what is expected."""
        answer = piece.answer
        if answer is None and piece.error is None:
            return
        with self._noting:
            request, answers = self.asked[piece.number]
            self.num_ended[piece.number] += 1
            if self.num_ended[piece.number] == request.n:  # so that nothing but leaks grows
                del self.asked[piece.number], self.num_ended[piece.number]
        if piece.error is not None:
            is_right = answers is None or _guests(request)
            self.note("refused", None if is_right else f"{piece.error}: {request}")
        elif answer is None or answers is None:
            self.note("answered", f"answered: {request}")
        elif answer.ending == "cancelled":
            begins = answers[piece.choice].text.startswith(answer.text)
            is_right = begins and request.cancelled.is_set()
            self.note("cancelled", None if is_right else f"cancelled: {request}")
        else:
            is_right = _essence(answer) == _essence(answers[piece.choice])
            self.note("answered", None if is_right else f"other answer: {request}")


def _essence(answer: Answer) -> tuple[object, ...]:
    """Return what of an answer is the same whoever shares its batch; scores differ by rounding."""
    tokens = [score.token for score in (*answer.prompt_tokens, *answer.tokens)]
    return answer.text, answer.parts, answer.sentences, answer.ending, answer.num_tokens, tokens


def _guests(request: Request) -> bool:
    return any("guest" in route.adapters for route in request.routes)


def _some_requests(alone: Runner, draw: random.Random) -> list[tuple[Request, list[Answer]]]:
    """Draw requests with the answers that each gets alone."""
    words = [word for word in WORDS if word.isalpha()]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    routes = [(), (), (Route(("two", "guest"), (0.5, 0.5)),), (Route(("one",), (1.5,)),)]
    found: list[tuple[Request, list[Answer]]] = []
    while len(found) < 300:
        question = text(draw.choice([8, 8, 60]))
        prompt: str | tuple[Message, ...] = question
        if draw.random() < 0.3:
            first = Message("user", question), Message("assistant", text(6))
            prompt = (*first, Message("user", text(8)))
        request = Request(
            prompt,
            Sampling(
                max_new_tokens=draw.randint(1, 16),
                stop=draw.choice([(), (), (draw.choice(words),)]),
                frequency_penalty=draw.choice([0.0, 0.0, 0.5]),
            ),
            draw.choice(routes),
            draw.choice(["route_once", "keep", "refill"]),
            system=draw.choice([None, None, "base", "probe"]),
            n=draw.choice([1, 1, 1, 2]),
            logprobs=2,
        )
        if request.system and request.routes:
            continue
        answers = alone.generate([request])
        tops = [score.top for answer in answers for score in answer.tokens]
        if all(top[0].logprob - top[1].logprob > MARGIN for top in tops):
            scores = draw.choice([{"logprobs": None}, {"logprobs": 3, "echo": True}])
            asked = replace(request, **scores)  # type: ignore[arg-type]
            found.append((asked, alone.generate([asked])))
    return found


def main() -> None:
    """Soak, check, write what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)
    options = parser.parse_args()
    choose_device(chosen_place(options.device).device.type)
    place = set_up(Runtime(dtype="float32", threads=1), seed=0)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), options.seed)
        works = [soak.ask] * 3 + [soak.ask_alone, soak.come_and_go]
        draws = [random.Random(options.seed + 1 + number) for number in range(len(works))]
        threads = [
            threading.Thread(target=work, args=(draw,), daemon=True)
            for work, draw in zip(works, draws, strict=True)
        ]
        for thread in threads:
            thread.start()
        begun, rss_mib = time.monotonic(), list[float]()
        while (spent := time.monotonic() - begun) < 60 * options.minutes:
            for piece in soak.scheduler.step():
                soak.check(piece)
            if len(rss_mib) <= spent:
                rss_mib.append(psutil.Process().memory_info().rss / 2**20)
        soak.ended.set()
        for thread in threads:
            thread.join()
        while not soak.scheduler.is_idle:
            for piece in soak.scheduler.step():
                soak.check(piece)
        assert soak.wrong == [], soak.wrong[:5]
        assert all(request.n > 1 for request, _ in soak.asked.values())  # refused as one
        assert soak.scheduler.num_free == 16  # the default batch
    quarter = len(rss_mib) // 4
    second = statistics.median(rss_mib[quarter : 2 * quarter])
    last = statistics.median(rss_mib[3 * quarter :])
    found = {
        "minutes": options.minutes,
        **dict(soak.happened),
        "wrong": len(soak.wrong),
        "rss_mib_second_quarter": round(second, 1),
        "rss_mib_last_quarter": round(last, 1),
    }
    write_results("soak", found, place=place, rounds=1, libraries=("torch", "transformers"))
    assert last <= 1.03 * second, f"memory grew from {second:.1f} to {last:.1f} MiB"


if __name__ == "__main__":
    main()
