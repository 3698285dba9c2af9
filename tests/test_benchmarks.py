"""The rivals of the fused engine: exact ones compute what it does, the others what they say."""

import torch
from torch import Tensor

from benchmarks.lora_rivals import rivals_of
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
