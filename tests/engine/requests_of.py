"""What the tests of requests and of the scheduler share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from dlplora.engine.answers import Answer
from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.engine.scheduler import Scheduler
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.models import Base
from dlplora.records.routes import Route
from tests.device import on_device
from tests.peft_adapters import peft_pool
from tests.tiny import TARGETS, tiny_base

ONE = Route(("one",), (1.0,), 0.9)
BOTH = Route(("two", "one"), (0.75, 0.25), 0.6)
QUESTIONS = [
    "what is up ?",
    "which colour : two a b c d ?",
    "say red",
    "sum of one plus two ?",
    "what is up ? what is down ? what is left ?",
]


def pooled_base(folder: Path) -> tuple[Base, Pool, dict[str, PeftModel]]:
    """Make a tiny base model with two adapters, and PEFT's models of them."""
    base = tiny_base()
    configs: dict[str, dict[str, Any]] = {
        "one": {"r": 2, "target_modules": TARGETS["llama"]},
        "two": {"r": 4, "target_modules": TARGETS["llama"][:1]},
    }
    models, adapters = peft_pool(base.model, configs, folder)
    pool = Pool(FusedLayers(base.model))
    for adapter in adapters:
        pool.add(adapter)
    return base, pool, models


class ByLength:
    """A router without memory: long texts go to BOTH."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def route(self, texts: Sequence[str]) -> list[Route]:
        self.read += texts
        return [BOTH if len(text) > 15 else ONE for text in texts]


def forwards(base: Base) -> list[tuple[int, ...]]:
    """Return a list that gets the shape of the tokens of each forward pass."""
    read: list[tuple[int, ...]] = []
    embed = base.model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape)))
    return read


def finished(scheduler: Scheduler, steps: int = 1000) -> dict[tuple[int, int], Answer | Exception]:
    """Step until nothing is left; return answers and errors by number and choice."""
    found: dict[tuple[int, int], Answer | Exception] = {}
    for _ in range(steps):
        if scheduler.is_idle:
            return found
        for piece in scheduler.step():
            end = piece.answer or piece.error
            if end is not None:
                assert (piece.number, piece.choice) not in found
                found[piece.number, piece.choice] = end
    raise AssertionError(f"not idle after {steps} steps")


def alone(runner: Runner, request: Request) -> list[Answer]:
    """Answer a request with nobody else, and nothing known of its prompt."""
    return list(
        Runner(runner.base, runner.pool, router=ByLength(), cache_mib=0).generate([request])
    )


def plain_logits(base: Base, pool: Pool, ids: Sequence[int], route: Route) -> torch.Tensor:
    """The logits (S, V) of one whole forward pass."""
    with torch.no_grad(), pool.mixing(pool.mix([route])):
        logits: torch.Tensor = base.model(on_device([list(ids)])).logits[0]
    return logits
