"""The gated MLP SwiGLU (arXiv 2002.05202): W_down (silu(W_gate x) · W_up x), with frozen weights.

Shapes: n tokens, I inputs, U hidden units.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

from dlplora.kernels.autograd import apply
from dlplora.kernels.definitions import computes

_LAYERS = ("gate_proj", "up_proj", "down_proj")


def reference(x: Tensor, gate_UI: Tensor, up_UI: Tensor, down_IU: Tensor) -> Tensor:
    """Return the MLP's output for `x`, by plain operations."""
    return linear(silu(linear(x, gate_UI)) * linear(x, up_UI), down_IU)


def is_candidate(module: nn.Module) -> bool:
    """Tell whether a module is some MLP."""
    return type(module).__name__.endswith("MLP")


def matches(module: nn.Module) -> bool:
    """Tell whether a module is a gated MLP of frozen linear layers without biases."""
    layers = [getattr(module, name, None) for name in _LAYERS]
    if not all(
        type(layer) is nn.Linear and layer.bias is None and not layer.weight.requires_grad
        for layer in layers
    ):
        return False
    x = torch.tensor([[-0.5, 0.3, 0.1], [40.0, -20.0, 30.0]])
    weights = [torch.linspace(-1, 1, 12).roll(turn).view(4, 3) for turn in (0, 3)]
    weights.append(torch.linspace(1, -1, 12).view(3, 4))
    act = getattr(module, "act_fn", None)
    return computes(
        module,
        x,
        expected=reference(x, *weights),
        act_fn=getattr(act, "forward", act),  # without hooks
        **{
            name: partial(linear, weight=weight)
            for name, weight in zip(_LAYERS, weights, strict=True)
        },
    )


def suits(module: Any, x: Tensor) -> bool:
    """Tell whether the input has the dtype of the weights."""
    is_equal: bool = x.dtype == module.down_proj.weight.dtype
    return is_equal


def fast_forward(module: Any, x: Tensor) -> Tensor:
    """Compute the output of a module that matches."""
    return apply(GatedMlp, x, *(getattr(module, name).weight for name in _LAYERS))


class GatedMlp(torch.autograd.Function):
    """What `reference` computes; the gradient reaches `x` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_UI: Tensor, up_UI: Tensor, down_IU: Tensor) -> Tensor:
        x_nI = x.reshape(-1, x.shape[-1])
        gate_nU, up_nU = x_nI @ gate_UI.T, x_nI @ up_UI.T
        open_nU = silu(gate_nU)
        y_nI = (open_nU * up_nU) @ down_IU.T
        ctx.save_for_backward(gate_nU, open_nU, up_nU, gate_UI, up_UI, down_IU)
        return y_nI.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate_nU, open_nU, up_nU, gate_UI, up_UI, down_IU = ctx.saved_tensors
        gradient_nU = gradient.reshape(-1, gradient.shape[-1]) @ down_IU
        to_up_nU = gradient_nU * open_nU
        to_gate_nU = torch.ops.aten.silu_backward(gradient_nU.mul_(up_nU), gate_nU)
        to_x = (to_gate_nU @ gate_UI).addmm_(to_up_nU, up_UI)
        return to_x.view(*gradient.shape[:-1], -1), None, None, None
