"""What many adapters cost: to load, in memory, for each change of a mix, and when a pool pages.

    python -m benchmarks.adapters [--base data/base] [--device cpu|cuda]

Seeded adapters on q and v of the real base model, in PEFT's folders. Each case runs in a process of
its own:

- loading: 100 adapters of rank 8, from disk to resident.
- mixed: 999 adapters of rank 8 and one of 64; memory beside what base and adapters hold.
- mixes: 16 prompts of three adapters each; what a decoding step takes longer after a change:
  all are new, the prompts are in another order, one has left, one has joined.
- paging: 200 adapters and memory for 20; routes with adapters that are resident, and that are not.

Writes benchmarks/results/adapters.json.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.devices import add_device, allocated_mib, chosen_place, synchronise
from benchmarks.lora_rivals import ALPHA, RANK, TARGETS, adapter_of, some_routes
from benchmarks.record import write_results
from dlplora.adapters import LoraAdapter, peft_tensors, read_adapter, write_adapter
from dlplora.engine.batch import Batch
from dlplora.engine.reading import prefill
from dlplora.lora.attach import Pool
from dlplora.lora.fused import FusedLinear
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import BatchMix
from dlplora.lora.paging import PagedPool
from dlplora.models import Base, load_base
from dlplora.records.routes import Route
from dlplora.records.training import AdapterTraining, Curve, write_adapter_training
from dlplora.runtime import keep_freed_memory

THREADS, ROUNDS = 2, 15


def seconds_of(work: Callable[[], object]) -> float:
    """Time a work once."""
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def held_mib() -> float:
    """Return the memory that holds tensors: on the GPU if one is used, else of this process."""
    if allocated := allocated_mib():
        return allocated
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


@contextmanager
def folders_of(base: Base, ranks: Sequence[int]) -> Iterator[list[Path]]:
    """Write an adapter of each rank, in PEFT's format."""
    with tempfile.TemporaryDirectory() as made:
        for number, rank in enumerate(ranks):
            config: Any = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(TARGETS))
            adapter = adapter_of(base, number, rank=rank)
            folder = Path(made) / adapter.name
            folder.mkdir()
            write_adapter(folder, config.to_dict(), peft_tensors(adapter.pairs), base_id=base.id)
            told = AdapterTraining(
                adapter.name, base.fingerprint, False, None, 0, 1, 1, (), Curve((), 0)
            )
            write_adapter_training(folder, told)
        yield sorted(Path(made).iterdir())


def weights_mib(pool: Pool, adapters: Sequence[LoraAdapter]) -> float:
    """Return what the weights of adapters take in the dtype of the base."""
    return sum(map(pool.layers.num_bytes, adapters)) / 2**20


def load(base: Base, folders: Sequence[Path], pool: Pool) -> list[LoraAdapter]:
    """Read adapters and attach them."""
    adapters = []
    for folder in folders:
        adapters.append(read_adapter(folder, base_fingerprint=base.fingerprint))
        pool.add(adapters[-1])
    return adapters


def measure_loading(base: Base, ranks: Sequence[int]) -> dict[str, float]:
    """Load adapters from disk: seconds, and memory beside what weights hold."""
    parameters = list(base.model.parameters())
    for parameter in parameters:
        parameter.sum()  # weights are mapped from the file: read them now
    base_mib = sum(parameter.nbytes for parameter in parameters) / 2**20
    with folders_of(base, ranks) as folders:
        before = held_mib()
        pool = Pool(FusedLayers(base.model))
        adapters: list[LoraAdapter] = []
        seconds = seconds_of(lambda: adapters.extend(load(base, folders, pool)))
        needed = weights_mib(pool, adapters)
    held = held_mib() - before
    return {
        "seconds": seconds,
        "base_mib": base_mib,
        "adapters_mib": needed,
        "held_mib": held,
        "memory_ratio": (base_mib + held) / (base_mib + needed),
    }


def measure_mixes(base: Base) -> dict[str, float]:
    """Time decoding steps after a mix has changed, beside the steps that follow."""
    pool = Pool(FusedLayers(base.model))
    for number in range(100):
        pool.add(adapter_of(base, number))
    routes = some_routes(100, 17)
    changes: dict[str, Callable[[Batch, Batch], None]] = {
        "all_new": lambda batch, other: None,
        "reordered": lambda batch, other: batch.keep([*range(1, 16), 0]),
        "one_left": lambda batch, other: batch.keep(range(15)),
        "one_joined": lambda batch, other: batch.join(other),
    }
    num_layers = sum(isinstance(layer, FusedLinear) for layer in base.model.modules())
    found = {}
    for name, change in changes.items():
        known, extra = [], []
        for _ in range(3 * ROUNDS):
            batch, other = (
                prefill(base, pool, [[7] * 8] * len(own), own) for own in (routes[:16], routes[16:])
            )
            if name != "all_new":
                batch.step([7] * 16)
            rows = batch.rows
            change(batch, other)
            of_mix = seconds_of(partial(BatchMix(rows).with_rows, batch.rows))
            first, later = (seconds_of(partial(batch.step, [7] * len(batch))) for _ in range(2))
            known.append(later)
            extra.append(of_mix + first - later)
        found[f"{name}_step_ms"] = 1000 * statistics.median(known)
        found[f"{name}_extra_microseconds_a_layer"] = 1e6 * statistics.median(extra) / num_layers
    return found


def measure_paging(base: Base, count: int = 200, share: float = 0.1) -> dict[str, float]:
    """Time routes to adapters of a pool that is larger than memory."""
    with folders_of(base, [RANK] * count) as folders:
        layers = FusedLayers(base.model)
        each = weights_mib(Pool(layers), [adapter_of(base, 0)])
        pool = PagedPool(layers, max_mib=share * count * each)
        load(base, folders, pool)
        for name in pool.names:  # files are read once, and stacks have grown
            pool.row(Route((name,), (1.0,)))
        draw, before = random.Random(0), held_mib()
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(20 * ROUNDS):
            name = draw.choice(draw.choice([pool.names, pool.resident]))
            is_resident, route = name in pool.resident, Route((name,), (1.0,))
            seconds[is_resident].append(seconds_of(partial(pool.row, route)))
    return {
        "num_adapters": count,
        "num_resident": len(pool.resident),
        "resident_ms": 1000 * statistics.median(seconds[True]),
        "paged_in_ms": 1000 * statistics.median(seconds[False]),
        "grown_mib": held_mib() - before,
    }


CASES: dict[str, Callable[[Base], dict[str, float]]] = {
    "loading_100": lambda base: measure_loading(base, [RANK] * 100),
    "mixed_1000": lambda base: measure_loading(base, [*[RANK] * 999, 64]),
    "mixes": measure_mixes,
    "paging": measure_paging,
}


def main() -> None:
    """Measure each case in a process of its own, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("data/base"))
    parser.add_argument("--case", choices=CASES, help="measure this one alone, and print it")
    add_device(parser)
    words = parser.parse_args()
    torch.set_num_threads(THREADS)
    place = chosen_place(words.device)
    if words.case:
        keep_freed_memory()
        base = load_base(words.base, place=place)
        with torch.inference_mode():
            found = CASES[words.case](base)
        print(json.dumps({name: round(value, 4) for name, value in found.items()}))
        return
    found = {}
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.adapters", "--base", str(words.base)]
        command += ["--device", place.device.type]
        done = subprocess.run(
            [*command, "--case", case], check=True, stdout=subprocess.PIPE, text=True
        )
        found[case] = json.loads(done.stdout.splitlines()[-1])
    libraries = ("torch", "transformers", "peft")
    write_results("adapters", found, place=place, rounds=ROUNDS, libraries=libraries)


if __name__ == "__main__":
    main()
