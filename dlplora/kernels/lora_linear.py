"""A frozen linear layer with one LoRA pair (arXiv 2106.09685): W x + b + s B A x.

The pair adds into the layer's own output and gradient, in the dtype of `x`, as the engine
computes it; PEFT computes it apart, in the dtype of the pair.

Shapes: n tokens, I inputs, O outputs, R rank.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from dlplora.kernels.autograd import apply


def reference(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    down_RI: Tensor,
    up_OR: Tensor,
    scaling: float,
) -> Tensor:
    """Return the layer's output for `x`, by plain operations."""
    low = linear(linear(x.to(down_RI.dtype), down_RI), up_OR)
    return (linear(x, weight_OI, bias_O) + scaling * low).to(x.dtype)


def is_candidate(module: nn.Module) -> bool:
    """Tell whether a module is a layer with some adapter of PEFT's LoRA."""
    return isinstance(module, LoraLayer)


def mismatch(module: nn.Module) -> str | None:
    """Return what a layer has besides one pair on a frozen linear layer; None if nothing."""
    if type(module) is not PeftLinear:
        return type(module).__name__
    base, names = module.base_layer, module.active_adapters
    if type(base) is not nn.Linear:
        return type(base).__name__
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "trainable base layer"
    if module.merged or module.disable_adapters:
        return "adapter merged or off"
    if len(names) != 1 or names[0] not in module.lora_A:
        return "several adapters"
    if module.lora_variant:
        return type(next(iter(module.lora_variant.values()))).__name__
    if module.lora_bias[names[0]]:
        return "bias of the pair"
    return None if isinstance(module.lora_dropout[names[0]], nn.Identity) else "dropout"


def matches(module: nn.Module) -> bool:
    """Tell whether PEFT would add one pair, without dropout or bias, to a frozen linear layer."""
    return mismatch(module) is None


def suits(module: nn.Module, _: Tensor) -> bool:
    """Tell whether a module that matched still does: its adapter may be off by now."""
    return matches(module)


def fast_forward(module: Any, x: Tensor) -> Tensor:
    """Compute the output of a module that matches."""
    (name,) = module.active_adapters
    base, down, up = module.base_layer, module.lora_A[name], module.lora_B[name]
    pair = down.weight, up.weight, module.scaling[name]
    return apply(LoraLinear, x, base.weight, base.bias, *pair)


class LoraLinear(torch.autograd.Function):
    """What `reference` computes; the gradient reaches `x` and the pair."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down_RI: Tensor,
        up_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        x_nI = x.reshape(-1, x.shape[-1])
        down, up = down_RI.to(x.dtype), (up_OR * scaling).to(x.dtype)
        y_nO = linear(x_nI, weight_OI, bias_O)
        low_nR = x_nI @ down.T
        y_nO.addmm_(low_nR, up.T)
        ctx.save_for_backward(x_nI, weight_OI, down, up, low_nR)
        ctx.scaling, ctx.dtype = scaling, down_RI.dtype
        return y_nO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_nI, weight_OI, down_RI, up_OR, low_nR = ctx.saved_tensors
        gradient_nO = gradient.reshape(-1, gradient.shape[-1])
        to_low_nR = gradient_nO @ up_OR
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (gradient_nO @ weight_OI).addmm_(to_low_nR, down_RI)
            to_x = to_x.view(*gradient.shape[:-1], -1)
        to_down_RI = (to_low_nR.T @ x_nI).to(ctx.dtype)
        to_up_OR = (gradient_nO.T @ low_nR).to(ctx.dtype).mul_(ctx.scaling)
        return to_x, None, None, to_down_RI, to_up_OR, None
