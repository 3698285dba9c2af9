"""The gated MLP against its reference, and which MLPs it knows."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config, SeedOssConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

from dlplora.kernels.autograd import apply
from dlplora.kernels.gated_mlp import GatedMlp, fast_forward, matches, reference
from tests.kernels.beside import assert_like_reference, drawn
from tests.tiny import tiny_sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_values_and_gradients_are_those_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weights = [drawn(24, 16, seed=1), drawn(24, 16, seed=2), drawn(16, 24, seed=3)]
    assert_like_reference(
        partial(apply, GatedMlp),
        reference,
        learned=[drawn(*shape)],
        fixed=[weight / 4 for weight in weights],
        dtype=dtype,
    )


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


class ClampedMLP(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(x)).clamp(max=7)
        return self.down_proj(gate * self.up_proj(x))


class DroppingMLP(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class ScaledMLP(LlamaMLP):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden) * getattr(self, "scale", 1.0)


def test_an_mlp_may_have_other_outputs_than_inputs() -> None:
    module = LlamaMLP(LlamaConfig(**tiny_sizes()))
    module.down_proj = nn.Linear(module.intermediate_size, 5, bias=False)
    assert matches(frozen(module))
    x = drawn(2, 3, 16).requires_grad_()
    found, expected = fast_forward(module, x), module(x)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "module",
    [LlamaMLP(LlamaConfig(**tiny_sizes())), Qwen3MLP(Qwen3Config(**tiny_sizes()))],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_gated_mlp_is_known_on_any_device(module: nn.Module, device: str) -> None:
    assert matches(frozen(module).to(device))


@pytest.mark.parametrize(
    "module",
    [
        LlamaMLP(LlamaConfig(**tiny_sizes())),  # its weights are learned
        frozen(LlamaMLP(LlamaConfig(**tiny_sizes(), mlp_bias=True))),
        frozen(LlamaMLP(LlamaConfig(**tiny_sizes(), hidden_act="gelu"))),
        frozen(Gemma3MLP(Gemma3TextConfig(**tiny_sizes()))),
        frozen(SeedOssMLP(SeedOssConfig(**tiny_sizes(), residual_dropout=0.1))),
        frozen(ClampedMLP(LlamaConfig(**tiny_sizes()))),
        frozen(DroppingMLP(LlamaConfig(**tiny_sizes()))),
        frozen(ScaledMLP(LlamaConfig(**tiny_sizes()))),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_mlps_are_not(module: Any) -> None:
    assert not matches(module.eval())
