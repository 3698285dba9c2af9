"""Packs beside rows one by one, by the model's own attention."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from dlplora.training.packing import Pack, is_packing, packed_logits, packing
from tests.tiny import TARGETS, tiny_model, tiny_sizes

COMMON = (4, 5, 6, 7, 8, 9, 10, 11)
ROWS = [(12, 13, 14), (20,), (21, 22, 23, 24, 25, 26, 27, 28, 29), (30, 31)]


def one_by_one(model: nn.Module, common: tuple[int, ...]) -> Tensor:
    """Logits of each row's own places, from the common beginning's last for the first row."""
    logits = [model(input_ids=torch.tensor([common + row])).logits[0] for row in ROWS]
    own = torch.cat([part[len(common) :] for part in logits])
    return torch.cat([logits[0][: len(common)], own])


def as_pack(model: nn.Module, common: tuple[int, ...]) -> Tensor:
    pack = Pack.of(common, ROWS)
    return packed_logits(model, pack, torch.ones(len(pack.ids), dtype=torch.bool))


@pytest.mark.parametrize("kind", sorted(set(TARGETS) - {"gpt2"}))  # that one has dropout
@pytest.mark.parametrize("common", [COMMON, ()], ids=["common", "apart"])
def test_logits_of_a_pack_are_those_of_each_row_by_itself(
    kind: str, common: tuple[int, ...]
) -> None:
    model = tiny_model(kind)
    expected = one_by_one(model, common)
    with packing(model):
        assert is_packing(model)
        found = as_pack(model, common)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert not is_packing(model)
    assert torch.equal(one_by_one(model, common), expected)


def test_gradients_of_a_pack_are_the_sums_over_rows() -> None:
    model = tiny_model().requires_grad_(True)
    weights = list(model.parameters())
    expected = torch.autograd.grad(one_by_one(model, COMMON).square().mean(), weights)
    with packing(model):
        found = torch.autograd.grad(as_pack(model, COMMON).square().mean(), weights)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_the_last_units_compute_only_what_is_wanted() -> None:
    model: Any = tiny_model()
    pack = Pack.of(COMMON, ROWS)
    wanted = torch.tensor([False] * (len(pack.ids) - 5) + [True, False] * 2 + [True])
    everything = one_by_one(model, COMMON)
    seen = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *told: seen.append(told[2].shape[1]))
    with packing(model):
        seen.clear()  # of the probe
        found = packed_logits(model, pack, wanted)
    assert seen == [len(pack.ids), 3]
    torch.testing.assert_close(found, everything[wanted], atol=1e-3, rtol=1e-4)


def test_a_pack_is_no_longer_than_what_its_rows_say() -> None:
    pack = Pack.of((4, 5), [(6,), (7, 8)])
    assert pack.ids == (4, 5, 6, 7, 8)
    assert pack.positions == [0, 1, 2, 2, 3]


def with_capped_scores() -> nn.Module:
    config = Gemma2Config(**tiny_sizes(), head_dim=4, attn_logit_softcapping=0.5)
    return Gemma2ForCausalLM(config)


def with_dropout() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**tiny_sizes(), attention_dropout=0.1))


def with_convolutions() -> nn.Module:
    config = Lfm2Config(**tiny_sizes(), layer_types=["conv", "full_attention"])
    return Lfm2ForCausalLM(config)


class _FromTheLeft(nn.Module):
    """Adds to each token a little of the one before it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> Tensor:
        shifted = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        inner: Tensor = self.layer(hidden)
        return inner + 0.01 * shifted


def with_a_way_past_attention(layer: int) -> nn.Module:
    model: Any = tiny_model()
    model.model.layers[layer].mlp = _FromTheLeft(model.model.layers[layer].mlp)
    return model


@pytest.mark.parametrize(
    "make",
    [
        with_capped_scores,
        with_dropout,
        with_convolutions,
        lambda: with_a_way_past_attention(0),
        lambda: with_a_way_past_attention(1),
        lambda: tiny_model("gpt2"),
    ],
)
def test_a_model_that_packs_would_change_is_left_as_it_is(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    before, state = model.config._attn_implementation, torch.get_rng_state()
    with packing(model):
        assert not is_packing(model)
        assert model.config._attn_implementation == before
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
