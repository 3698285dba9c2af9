"""A linear layer with a LoRA pair against its reference, and which layers of PEFT it knows."""

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from dlplora.kernels.autograd import apply
from dlplora.kernels.choice import use_kernels
from dlplora.kernels.lora_linear import LoraLinear, matches, mismatch, reference, suits
from tests.kernels.beside import assert_like_reference, drawn
from tests.tiny import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_values_and_gradients_are_those_of_the_reference(
    shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype
) -> None:
    weight_OI = drawn(12, 16, seed=1)
    bias_O = drawn(12, seed=2) if has_bias else None

    def ordered(function: Any) -> Any:
        return lambda x, down_RI, up_OR: function(
            x, weight_OI.to(x.dtype), bias_O if bias_O is None else bias_O.to(x.dtype),
            down_RI, up_OR, 0.5,
        )  # fmt: skip

    assert_like_reference(
        ordered(partial(apply, LoraLinear)),
        ordered(reference),
        learned=[drawn(*shape), drawn(3, 16, seed=3), drawn(12, 3, seed=4)],
        fixed=[],
        dtype=dtype,
    )


def test_a_float32_pair_on_a_bfloat16_layer_gets_float32_gradients() -> None:
    x, weight_OI = drawn(5, 16).bfloat16(), drawn(12, 16, seed=1).bfloat16()
    pair = [drawn(3, 16, seed=3).requires_grad_(), drawn(12, 3, seed=4).requires_grad_()]
    found, expected = (
        torch.autograd.grad(function(x, weight_OI, None, *pair, 0.5).float().sum(), pair)
        for function in (partial(apply, LoraLinear), reference)
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.02 * other.norm()


def adapted(**more: Any) -> Any:
    config = LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    return get_peft_model(tiny_model("qwen2"), config)


def q_proj(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


def test_a_plain_pair_is_known() -> None:
    assert matches(q_proj(adapted()))


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"lora_dropout": 0.5}, "dropout"),
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True}, "bias of the pair"),
        ({"bias": "lora_only"}, "trainable base layer"),
        ({"bias": "all"}, "trainable base layer"),
    ],
)
def test_pairs_with_more_are_not(more: dict[str, Any], found: str) -> None:
    layer = q_proj(adapted(**more))
    assert not matches(layer)
    assert mismatch(layer) == found


def test_nor_are_several_pairs_or_a_trainable_weight() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert mismatch(q_proj(model)) == "several adapters"
    layer = q_proj(adapted())
    layer.base_layer.weight.requires_grad_(True)
    assert mismatch(layer) == "trainable base layer"


def test_while_its_adapter_is_off_a_layer_computes_without_it() -> None:
    model, x = adapted(), drawn(2, 16)
    layer = q_proj(model)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    expected = layer(x)
    with use_kernels(model, "auto"):
        torch.testing.assert_close(layer(x), expected)
        layer.enable_adapters(False)
        assert not suits(layer, x)
        assert torch.equal(layer(x), layer.base_layer(x))
