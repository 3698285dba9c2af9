"""Works timed in turns in one process, a GPU's included, and ratios with medians."""

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from benchmarks.devices import synchronise

Work = Callable[[], object]
Steps = Callable[[], Iterator[None]]  # a work in parts


def interleaved(works: Mapping[str, Work], rounds: int, title: str) -> dict[str, list[float]]:
    """Time each work once a round, in another order each time; the first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    rng = random.Random(0)
    for number in range(rounds + 1):
        for name in rng.sample(sorted(works), len(works)):
            synchronise()
            start = time.perf_counter()
            works[name]()
            synchronise()
            if number:
                seconds[name].append(time.perf_counter() - start)
    _tell(title, seconds)
    return seconds


def in_turns(works: Mapping[str, Steps], rounds: int, title: str) -> dict[str, list[float]]:
    """Time works part by part in turns, so that a slow phase of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    rng = random.Random(0)
    for number in range(rounds + 1):
        running = {name: work() for name, work in works.items()}
        spent = dict.fromkeys(works, 0.0)
        while running:
            for name in rng.sample(sorted(running), len(running)):
                synchronise()
                start = time.perf_counter()
                ended = next(running[name], running) is running
                synchronise()
                spent[name] += time.perf_counter() - start
                if ended:
                    del running[name]
        if number:
            for name, taken in spent.items():
                seconds[name].append(taken)
    _tell(title, seconds)
    return seconds


def _tell(title: str, seconds: Mapping[str, list[float]]) -> None:
    medians = {name: f"{1000 * statistics.median(part):.1f}" for name, part in seconds.items()}
    print(f"{title}: ms {medians}", file=sys.stderr, flush=True)


def ratios(seconds: Mapping[str, list[float]], reference: str) -> dict[str, float]:
    """Return the median over rounds of each work's time by that of the reference."""
    return {
        name: round(
            statistics.median(
                mine / other for mine, other in zip(part, seconds[reference], strict=True)
            ),
            3,
        )
        for name, part in seconds.items()
    }
