"""RMSNorm against its reference, and which norms it knows."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from dlplora.kernels.autograd import apply
from dlplora.kernels.rms_norm import RmsNorm, matches, reference, suits
from tests.kernels.beside import assert_like_reference, drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 48)])
def test_values_and_gradients_are_those_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert_like_reference(
        partial(apply, RmsNorm),
        reference,
        learned=[3 * drawn(*shape)],
        fixed=[1 + drawn(48, seed=1), 1e-5],
        dtype=dtype,
    )


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_rms_norm_is_known_on_any_device(kind: type[nn.Module], device: str) -> None:
    assert matches(frozen(kind(8)).to(device))


class HalvedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) / 2


class ShiftedRMSNorm(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight + 1 if getattr(self, "is_shifted", False) else self.weight
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return weight * hidden_states * scale


def test_an_input_of_another_dtype_than_the_weight_is_left_to_the_own_forward() -> None:
    norm = frozen(LlamaRMSNorm(8))
    assert suits(norm, drawn(2, 8))
    assert not suits(norm, drawn(2, 8).bfloat16())


@pytest.mark.parametrize(
    "module",
    [
        LlamaRMSNorm(8),  # its weight is learned
        frozen(Gemma3RMSNorm(8)),
        frozen(HalvedRMSNorm(8)),
        frozen(ShiftedRMSNorm(8)),
        frozen(nn.LayerNorm(8)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_norms_are_not(module: nn.Module) -> None:
    assert not matches(module)
