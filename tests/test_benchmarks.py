"""Benchmarks: rivals of the fused engine compute what they say, and all run on a chosen device."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.devices import chosen_place
from benchmarks.lora_rivals import rivals_of
from tests.device import choose_device
from tests.tiny import tiny_base

EXACT = ("peft_cat", "peft_cat_float32", "loop", "einsum")
PROMPTS = 4


def test_rivals_of_the_fused_engine_compute_the_same_mixes_and_go_on_writing() -> None:
    base = tiny_base()
    rivals, _ = rivals_of(base, PROMPTS)
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(5, base.model.config.vocab_size, (PROMPTS, 9), generator=generator)
    logits: dict[str, tuple[Tensor, Tensor]] = {}
    for name, rival in rivals.items():
        batch = rival.read(ids_BS)
        read_BV = batch.logits_BV.clone()
        batch.step([7] * PROMPTS)
        logits[name] = (read_BV, batch.logits_BV)
    for name in EXACT:
        torch.testing.assert_close(logits[name], logits["fused"], atol=1e-5, rtol=1e-4)
    for one, other in (
        ("peft_single", "peft_single_float32"),
        ("peft_mixed_batch", "peft_mixed_batch_float32"),
    ):
        torch.testing.assert_close(logits[one], logits[other], atol=1e-5, rtol=1e-4)
    for name in ("fused", "peft_single", "peft_mixed_batch"):
        assert not torch.allclose(logits[name][0], logits["base"][0], atol=1e-4)


def test_every_benchmark_that_runs_a_model_takes_a_device(root: Path) -> None:
    sources = [file.read_text() for file in sorted((root / "benchmarks").glob("*.py"))]
    running = [
        source
        for source in sources
        if "write_results(" in source and re.search("load_base|Engine|Runner", source)
    ]
    assert len(running) > 8
    assert all("add_device(parser)" in source and "chosen_place(" in source for source in running)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(SystemExit, match=r"^--device cuda: torch finds no CUDA device here"):
        chosen_place("cuda")
    with pytest.raises(pytest.UsageError, match=r"^--device cuda: torch finds no CUDA device here"):
        choose_device("cuda")
    assert chosen_place(None).device == chosen_place("cpu").device == torch.device("cpu")
    assert chosen_place("cpu", torch.float32).dtype == torch.float32
