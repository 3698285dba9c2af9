"""Attention on other devices than the CPU: by sdpa, under masks that are written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlplora.attention import implementation_for, knows_masks, written_out
from dlplora.engine.batch import Batch
from dlplora.engine.cache import new_cache
from dlplora.engine.option_scoring import score_options
from dlplora.engine.prefill import Prefill
from dlplora.engine.reading import prefill
from dlplora.lora.attach import Pool, attached
from dlplora.models import Base
from dlplora.records.routes import BASE_ROUTE, Route
from tests.peft_adapters import peft_pool
from tests.tiny import TARGETS, tiny_base

PROMPTS = [(*range(4, 12), *range(12, 12 + size)) for size in (3, 9, 1)]
ROUTES = [Route(("one",), (1.0,)), BASE_ROUTE, BASE_ROUTE]
OPTIONS = [["red", "green blue"], ["yes"], ["a", "b c d"]]
KNOWING = ["llama", "qwen2", "phi3", "gpt2"]


def write_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all masks of models that know them be written out, on every device."""

    def written(model: Any, cache: object, mask_BT: Tensor, num_new: int) -> Tensor:
        assert knows_masks(model, cache)
        return written_out(mask_BT.to(model.device), num_new, model.dtype)

    monkeypatch.setattr("dlplora.engine.batch.mask_for", written)


def run(base: Base, pool: Pool) -> tuple[list[Tensor], list[float]]:
    """Read at once and in parts, write, join and score; return all logits and sums."""
    batch = prefill(base, pool, PROMPTS, ROUTES)
    logits = [batch.logits_BV]
    scores = [sum(one.logprobs) for one in score_options(batch, OPTIONS)]
    read = Prefill(base, pool.layers, PROMPTS, [pool.row(route) for route in ROUTES])
    while not read.advance(6):
        pass
    other: Batch = read.batch()
    logits.append(other.logits_BV)
    batch.step([5, 6, 7])
    batch.join(other)
    batch.step([5, 6, 7, 5, 6, 7])
    return [*logits, batch.logits_BV], scores


@pytest.mark.parametrize("kind", KNOWING)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_that_is_written_out_lets_tokens_see_the_same(
    kind: str, implementation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(kind)
    base.model.set_attn_implementation(implementation)
    config = {"r": 2, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
    with attached(base.model, peft_pool(base.model, {"one": config}, tmp_path)[1]) as pool:
        expected, sums = run(base, pool)
        write_out(monkeypatch)
        found, written_sums = run(base, pool)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert written_sums == pytest.approx(sums, abs=1e-4)


def test_models_that_go_by_more_than_masks_get_no_mask_that_is_written_out() -> None:
    for kind, knows in (("llama", True), ("sliding", False), ("lfm2", False)):
        base = tiny_base(kind)
        assert knows_masks(base.model, new_cache(base, 2)) == knows


@pytest.mark.parametrize(
    ("device", "trains", "expected"),
    [
        ("cpu", True, "eager"),
        ("cpu", False, "sdpa"),
        ("cuda", True, "sdpa"),
        ("cuda", False, "sdpa"),
    ],
)
def test_attention_follows_device_and_use(device: str, trains: bool, expected: str) -> None:
    assert implementation_for(torch.device(device), trains=trains) == expected
