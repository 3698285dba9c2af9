"""How long a short request waits behind a long prompt, and what a chat's second turn costs.

    python -m benchmarks.scheduler [--base data/base] [--rounds 9] [--device cpu|cuda]

The real base model without adapters. `first_token` is the time from a short request's arrival,
while a prompt of 2,000 tokens is read, to its first piece: with the prompt read in parts of
`prefill_tokens`, and at once. `whole_long` is the time of the long request with each. `second_turn`
is the time to the first piece of the second turn of a chat whose first turn and answer are in the
prefix cache, and without a cache. Medians over rounds, in turns. Written to
benchmarks/results/scheduler.json.
"""

import argparse
import random
import statistics
import threading
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.devices import add_device, chosen_place
from benchmarks.record import write_results
from benchmarks.timing import interleaved
from dlplora.engine.requests import Message, Request
from dlplora.engine.runner import Runner
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.models import Base, load_base
from dlplora.records.routes import BASE_ROUTE
from dlplora.routing.simple import ConstantRouter
from dlplora.sampling import Sampling

LONG, THREADS = 2000, 2
PARTS = (128, 256, 512, 1024, LONG)
FEW = Sampling(max_new_tokens=8, ignore_eos=True)


def runner_of(base: Base, prefill_tokens: int, cache_mib: float = 0) -> Runner:
    """Return a runner of the base model alone."""
    pool = Pool(FusedLayers(base.model))
    return Runner(
        base,
        pool,
        router=ConstantRouter(BASE_ROUTE),
        prefill_tokens=prefill_tokens,
        cache_mib=cache_mib,
    )


def wait_behind(runner: Runner, long: tuple[int, ...], delay: float) -> tuple[float, float]:
    """Let a short request arrive some seconds after a long one has begun to be read.

    Returns the seconds from its arrival to its first piece, and those of the whole long request.
    """
    scheduler = runner.scheduler()
    arrived: list[float] = []

    def arrive() -> None:
        time.sleep(delay)
        arrived.append(time.perf_counter())
        scheduler.add(Request("What is the capital of France?", FEW))

    scheduler.add(Request(long, FEW))
    thread = threading.Thread(target=arrive)
    start = time.perf_counter()
    thread.start()
    first = whole = 0.0
    while not (first and whole):
        for piece in scheduler.step():
            if piece.number == 1 and not first:
                first = time.perf_counter() - arrived[0]
            if piece.number == 0 and piece.answer:
                whole = time.perf_counter() - start
    thread.join()
    return first, whole


def first_piece(runner: Runner, request: Request) -> float:
    """Return the seconds to a request's first piece."""
    start = time.perf_counter()
    pieces = runner.stream(request)
    next(pieces)
    seconds = time.perf_counter() - start
    pieces.close()  # type: ignore[attr-defined]
    return seconds


def second_turns(base: Base, rounds: int) -> dict[str, float]:
    """Time the second turn of chats, and prompts of the same length of which nothing is known."""
    draw = torch.Generator().manual_seed(0)
    words = ["sun", "moon", "river", "stone", "paper", "seven", "green", "north", "table", "music"]
    told: dict[str, list[float]] = {"known": [], "unknown": []}
    lengths = []
    for _ in range(rounds):
        picks = torch.randint(len(words), (600,), generator=draw).tolist()
        text = " ".join(words[pick] for pick in picks)
        runner = runner_of(base, 512, cache_mib=256)
        (answer,) = runner.generate([Request(text, FEW)])
        turns = Message("user", text), Message("assistant", answer.text)
        second = Request((*turns, Message("user", "And then?")), FEW)
        told["unknown"].append(first_piece(runner_of(base, 512), second))
        told["known"].append(first_piece(runner, second))
        (again,) = runner.generate([second])
        lengths.append(again.num_prompt_tokens)
    return {
        "prompt_tokens": statistics.median(lengths),
        **{f"{name}_seconds": round(statistics.median(part), 3) for name, part in told.items()},
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("data/base"))
    parser.add_argument("--rounds", type=int, default=9)
    add_device(parser)
    options = parser.parse_args()
    place = chosen_place(options.device)
    base = load_base(options.base, place=place)
    torch.set_num_threads(THREADS)
    ids = torch.randint(5, 40_000, (LONG,), generator=torch.Generator().manual_seed(0))
    long = tuple(ids.tolist())
    draw = random.Random(0)
    waits: dict[int, list[tuple[float, float]]] = {size: [] for size in PARTS}

    def measure(size: int) -> None:
        delay = draw.uniform(0, 0.3)
        waits[size].append(wait_behind(runner_of(base, size), long, delay))

    works = {str(size): partial(measure, size) for size in PARTS}
    interleaved(works, options.rounds, "short behind long")
    found = {
        "long_prompt_tokens": LONG,
        "by_prefill_tokens": {
            str(size): {
                "first_token_seconds": round(statistics.median(first for first, _ in part[1:]), 3),
                "whole_long_seconds": round(statistics.median(whole for _, whole in part[1:]), 3),
            }
            for size, part in waits.items()
        },
        "second_turn": second_turns(base, options.rounds),
    }
    write_results(
        "scheduler",
        found,
        place=place,
        rounds=options.rounds,
        libraries=("torch", "transformers"),
    )


if __name__ == "__main__":
    main()
