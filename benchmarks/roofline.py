"""How much of what the device can multiply is used: training, reading prompts, writing.

    python -m benchmarks.roofline [--data data] [--rounds 5] [--device cpu|cuda]

The ceiling is the best rate of square products in the dtype of the model. Work is counted as two
operations for each weight of the linear layers and token; in training twice that, as gradients go
through frozen weights but not into them. Attention and the adapters are left out.

Writes benchmarks/results/roofline.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import add_device, chosen_place, synchronise
from benchmarks.record import write_results
from benchmarks.training import BATCH, TASKS, THREADS, read_task, with_lora
from dlplora.data.batches import shared_beginning
from dlplora.engine.reading import prefill
from dlplora.kernels.choice import use_kernels
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.models import Base, load_base
from dlplora.records.routes import BASE_ROUTE
from dlplora.runtime import Place, keep_freed_memory
from dlplora.training.loss import mean_loss

SIZES = (512, 1024, 2048, 4096)
PROMPTS = (16, 64)


def seconds_of(work: Callable[[], object], rounds: int) -> float:
    """Return the median time of a work, the first one left out."""
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        synchronise()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def ceiling(place: Place, rounds: int) -> float:
    """Return the best rate of square products, in operations a second."""
    best = 0.0
    for size in SIZES:
        left, right = torch.randn(2, size, size).to(place.device, place.dtype)
        best = max(best, 2 * size**3 / seconds_of(partial(torch.mm, left, right), rounds))
    return best


def weights_of(base: Base) -> tuple[int, int]:
    """Return the numbers of weights of the blocks' linear layers and of the head."""
    head: Any = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [layer for layer in base.model.modules() if isinstance(layer, torch.nn.Linear)]
    blocks = sum(layer.weight.numel() for layer in linear if layer is not head)
    return blocks, head.weight.numel()


def measure(data: Path, place: Place, rounds: int) -> dict[str, dict[str, float]]:
    """Time the works and count their operations."""
    base = load_base(data / "base", place=place)
    blocks, head = weights_of(base)
    top = ceiling(place, rounds)
    found = {"matmul": {"gflops": top / 1e9, "share": 1.0}}

    def note(name: str, operations: float, seconds: float) -> None:
        rate = operations / seconds
        found[name] = {"gflops": rate / 1e9, "share": rate / top, "milliseconds": 1000 * seconds}

    pool = Pool(FusedLayers(base.model))
    count, width = PROMPTS
    ids = torch.randint(5, 40_000, PROMPTS, generator=torch.Generator().manual_seed(0)).tolist()
    routes = [BASE_ROUTE] * count
    read = partial(prefill, base, pool, ids, routes)
    note("prefill_16x64", 2 * count * (width * blocks + head), seconds_of(read, rounds))
    for size in (1, 16, 64):
        batch = prefill(base, pool, ids[:1] * size, routes[:1] * size)
        step = partial(batch.step, [7] * size)
        note(f"decode_{size}x1", 2 * size * (blocks + head), seconds_of(step, rounds))

    base = load_base(data / "base", place=place, trains=True)
    model = with_lora(base, {}).train()
    for kind, name in TASKS.items():
        part = read_task(data, name, base).batches[1]
        prompts = [pair.prompt for pair in part]
        shared = shared_beginning(prompts)
        tokens = shared + sum(len(pair.prompt) - shared + len(pair.answer) for pair in part)
        answers = sum(len(pair.answer) for pair in part)

        operations = 2 * 2 * (tokens * blocks + answers * head)
        with use_kernels(model, "auto") as ran:

            def learn(part: Any = part, ran: Any = ran) -> None:
                loss = mean_loss(model, part, base.chat, ran=ran)
                loss.backward()  # type: ignore[no-untyped-call]

            note(f"training_{kind}_{BATCH}", operations, seconds_of(learn, rounds))
    return {
        name: {key: round(value, 3) for key, value in part.items()} for name, part in found.items()
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=5)
    add_device(parser)
    words = parser.parse_args()
    torch.set_num_threads(THREADS)
    keep_freed_memory()
    place = chosen_place(words.device)
    found = {"works": measure(words.data, place, words.rounds)}
    write_results(
        "roofline",
        found,
        place=place,
        rounds=words.rounds,
        libraries=("torch", "transformers"),
    )


if __name__ == "__main__":
    main()
