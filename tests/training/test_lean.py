"""The leaner layers beside the model's and PEFT's own: the same losses and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    SeedOssConfig,
    SeedOssForCausalLM,
)
from transformers.models.llama import modeling_llama

from dlplora.training.lean import lean
from dlplora.training.loss import mean_loss
from dlplora.training.packing import is_packing
from dlplora.training.pairs import Pair
from tests.tiny import TARGETS, chat_of, tiny_model, tiny_sizes, tiny_tokenizer

CHAT = chat_of(tiny_tokenizer(), "")
BATCH = [
    Pair((4, 5, 6, 7, 8, 9, 10), (11, 12, 2)),
    Pair((4, 5, 6, 20, 21, 22, 23, 24, 25, 26, 27), (13, 2)),
    Pair((4, 5, 6, 14), (15, 16, 17, 18, 2)),
]


def with_adapter(model: torch.nn.Module, targets: list[str] | str, **more: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", **more)
    adapted = get_peft_model(model, config).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return adapted


def loss_and_gradients(model: PeftModel) -> tuple[Tensor, ...]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = mean_loss(model, BATCH, CHAT)
    return loss.detach(), *torch.autograd.grad(loss, trained)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    one, other = (torch.cat([part.flatten() for part in parts[1:]]) for parts in (found, expected))
    assert (one - other).norm() <= 1e-4 * other.norm()  # sharp models, in float32


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", list(TARGETS))
@pytest.mark.parametrize("everywhere", [False, True])
def test_losses_and_gradients_are_those_of_plain_layers(kind: str, everywhere: bool) -> None:
    targets = "all-linear" if everywhere else TARGETS[kind]
    model = with_adapter(tiny_model(kind), targets)  # type: ignore[arg-type]
    expected = loss_and_gradients(model)
    with lean(model):
        found = loss_and_gradients(model)
    assert_same(found, expected)
    for one, other in zip(loss_and_gradients(model), expected, strict=True):
        assert torch.equal(one, other)  # all as before


def test_in_bfloat16_gradients_differ_by_its_noise() -> None:
    exact = with_adapter(tiny_model(), TARGETS["llama"])
    expected = torch.cat([part.flatten() for part in loss_and_gradients(exact)])
    model = with_adapter(tiny_model().bfloat16(), TARGETS["llama"])
    plain = torch.cat([part.flatten() for part in loss_and_gradients(model)])
    with lean(model):
        found = torch.cat([part.flatten() for part in loss_and_gradients(model)])
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1.5 * (plain - expected).norm() + 0.01 * expected.norm()


def test_every_layer_of_a_llama_is_replaced_and_put_back() -> None:
    model = with_adapter(tiny_model(), TARGETS["llama"])
    own = modeling_llama.apply_rotary_pos_emb
    kinds = ("LlamaRMSNorm", "LlamaMLP", "Linear")
    plain = [module for module in model.modules() if "forward" in vars(module)]
    with lean(model):
        replaced = [
            module
            for module in model.modules()
            if "forward" in vars(module) and type(module).__name__ in kinds
        ]
        assert len(replaced) == 5 + 2 + 4  # norms of two layers and the last, units, q and v
        assert modeling_llama.apply_rotary_pos_emb is not own
        assert is_packing(model)
    assert modeling_llama.apply_rotary_pos_emb is own
    assert not is_packing(model)
    assert [module for module in model.modules() if "forward" in vars(module)] == plain


@pytest.mark.parametrize(
    "more", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str
)
def test_an_adapter_that_is_more_than_a_pair_keeps_its_own_forward(more: dict[str, Any]) -> None:
    model = with_adapter(tiny_model("qwen2"), ["q_proj"], **more)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with lean(model):
        assert "forward" not in vars(layer)


def with_biased_units() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**tiny_sizes(), mlp_bias=True))


def with_other_units() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**tiny_sizes(), hidden_act="gelu"))


def with_units_that_drop() -> PreTrainedModel:
    config = SeedOssConfig(**tiny_sizes(), head_dim=4, attention_dropout=0.0, residual_dropout=0.1)
    return SeedOssForCausalLM(config)


def with_half_rotated_heads() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**tiny_sizes(32), partial_rotary_factor=0.5))


@pytest.mark.parametrize(
    "make",
    [with_biased_units, with_other_units, with_units_that_drop, with_half_rotated_heads],
)
def test_layers_of_another_kind_keep_their_own_form(make: Callable[[], PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = with_adapter(make(), "all-linear")
    expected = loss_and_gradients(model)
    with lean(model):
        assert is_packing(model)
        assert not any(
            "forward" in vars(layer.mlp) for layer in model.base_model.model.model.layers[:-1]
        )
        assert_same(loss_and_gradients(model), expected)
