"""Packs against the reference and against rows one by one, by the model's own attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.models.llama import modeling_llama

from dlplora.kernels import packed_attention
from dlplora.kernels.autograd import apply
from dlplora.kernels.choice import use_kernels
from dlplora.kernels.definitions import defining_modules
from dlplora.kernels.pack import Pack
from dlplora.kernels.packed_attention import (
    NAME,
    PackedAttention,
    packed_logits,
    reference,
)
from tests.kernels.beside import assert_like_reference, drawn
from tests.tiny import TARGETS, tiny_model, tiny_sizes

SHARED = (4, 5, 6, 7, 8, 9, 10, 11)
ROWS = [(12, 13, 14), (20,), (21, 22, 23, 24, 25, 26, 27, 28, 29), (30, 31)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shared", [SHARED, ()], ids=["prefix", "apart"])
def test_values_and_gradients_are_those_of_the_reference(
    shared: tuple[int, ...], window: int | None, dtype: torch.dtype
) -> None:
    pack = Pack.of(shared, ROWS)
    size = len(pack.ids)
    vectors = [drawn(1, heads, size, 8, seed=heads) for heads in (4, 2, 2)]
    assert_like_reference(
        lambda *given: apply(PackedAttention, *given, pack.blocks, 0.4, window),
        lambda *given: reference(*given, pack, scaling=0.4, window=window),
        learned=vectors,
        fixed=[],
        dtype=dtype,
    )


def one_by_one(model: nn.Module, shared: tuple[int, ...]) -> Tensor:
    """Logits of each row's own places, and of the prefix's as the first row has them."""
    logits = [model(input_ids=torch.tensor([shared + row])).logits[0] for row in ROWS]
    own = torch.cat([part[len(shared) :] for part in logits])
    return torch.cat([logits[0][: len(shared)], own])


def as_pack(model: nn.Module, shared: tuple[int, ...]) -> Tensor:
    pack = Pack.of(shared, ROWS)
    return packed_logits(model, pack, torch.ones(len(pack.ids), dtype=torch.bool))


@pytest.mark.parametrize("kind", sorted(set(TARGETS) - {"gpt2"}))  # that one has dropout
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shared", [SHARED, ()], ids=["prefix", "apart"])
def test_logits_of_a_pack_are_those_of_each_row_by_itself(
    kind: str, attention: str, shared: tuple[int, ...]
) -> None:
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    expected = one_by_one(model, shared)
    with use_kernels(model, "auto") as ran:
        assert "packed_attention" in ran
        found = as_pack(model, shared)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(one_by_one(model, shared), expected)


def test_gradients_of_a_pack_are_the_sums_over_rows() -> None:
    model = tiny_model().requires_grad_(True)  # so that no layer but attention has a kernel
    weights = list(model.parameters())
    expected = torch.autograd.grad(one_by_one(model, SHARED).square().mean(), weights)
    with use_kernels(model, "auto"):
        found = torch.autograd.grad(as_pack(model, SHARED).square().mean(), weights)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_without_the_interface_for_packs_logits_are_nan() -> None:
    model = tiny_model()
    with use_kernels(model, "auto"):
        assert as_pack(model, SHARED).isfinite().all()
    assert as_pack(model, SHARED).isnan().all()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in the probe
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    model = tiny_model().requires_grad_(True).train()
    weights = list(model.parameters())
    expected = torch.autograd.grad(one_by_one(model, SHARED).square().mean(), weights)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    with use_kernels(model, "auto") as ran:
        assert "packed_attention" in ran
        as_pack(model, SHARED).square().mean().backward()  # type: ignore[no-untyped-call]
    for weight, other in zip(weights, expected, strict=True):
        assert weight.grad is not None
        assert (weight.grad - other).norm() <= 1e-4 * other.norm()


def test_a_window_that_attention_is_told_is_kept_in_packs() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**tiny_sizes(), sliding_window=7)).eval()
    expected = one_by_one(model, SHARED)
    with use_kernels(model, "auto") as ran:
        assert "packed_attention" in ran
        torch.testing.assert_close(as_pack(model, SHARED), expected, atol=1e-4, rtol=1e-4)


def with_a_window_in_the_mask_alone() -> nn.Module:
    model = MistralForCausalLM(MistralConfig(**tiny_sizes(), sliding_window=7))
    for layer in model.model.layers:
        layer.self_attn.config = MistralConfig(**tiny_sizes(), sliding_window=None)
        layer.self_attn.config._attn_implementation = "eager"
    return model


def test_running_out_of_memory_while_a_model_is_tried_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(packed_attention, "packed_logits", fail)
    model, own = tiny_model(), modeling_llama.ALL_ATTENTION_FUNCTIONS
    with pytest.raises(MemoryError), use_kernels(model, "auto"):
        pass
    assert modeling_llama.ALL_ATTENTION_FUNCTIONS is own


def test_nothing_is_registered_and_all_is_put_back() -> None:
    model, own = tiny_model(), modeling_llama.ALL_ATTENTION_FUNCTIONS
    names = set(AttentionInterface().valid_keys())
    with use_kernels(model, "auto") as ran:
        assert "packed_attention" in ran
        assert modeling_llama.ALL_ATTENTION_FUNCTIONS is not own
        assert set(AttentionInterface().valid_keys()) == names
    assert modeling_llama.ALL_ATTENTION_FUNCTIONS is own


def test_a_pack_holds_its_prefix_once() -> None:
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
        with_a_window_in_the_mask_alone,
        lambda: with_a_way_past_attention(0),
        lambda: with_a_way_past_attention(1),
        lambda: tiny_model("gpt2"),
    ],
)
def test_a_model_that_packs_would_change_keeps_its_attention(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    state, modes = torch.get_rng_state(), {part: part.training for part in model.modules()}
    homes = defining_modules(model, NAME)
    with use_kernels(model, "auto") as ran:
        assert "packed_attention" not in ran
        assert all(type(getattr(home, NAME)) is AttentionInterface for home in homes)
    assert {part: part.training for part in model.modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
