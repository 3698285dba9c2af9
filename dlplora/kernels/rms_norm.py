"""RMSNorm (arXiv 1910.07467): w · x / √(mean(x²) + ε), in float32, with a frozen weight w."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dlplora.kernels.autograd import apply
from dlplora.kernels.definitions import computes


def reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the norm of each vector of `x`, by plain operations."""
    wide = x.float()
    scale = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (weight.float() * wide * scale).to(x.dtype)


def is_candidate(module: nn.Module) -> bool:
    """Tell whether a module is some norm."""
    return type(module).__name__.endswith("Norm")


def matches(module: nn.Module) -> bool:
    """Tell whether a module is an RMSNorm with a frozen weight."""
    names = [name for name, _ in module.named_parameters()]
    if names != ["weight"] or not hasattr(module, "variance_epsilon"):
        return False
    x, weight, epsilon = torch.linspace(-3, 3, 8).view(2, 4), torch.linspace(0.5, 2, 4), 0.1
    expected = reference(x, weight, epsilon)
    return not next(module.parameters()).requires_grad and computes(
        module, x, expected=expected, weight=weight, variance_epsilon=epsilon
    )


def suits(module: Any, x: Tensor) -> bool:
    """Tell whether the input has the dtype of the weight: else families differ in the output's."""
    is_equal: bool = x.dtype == module.weight.dtype
    return is_equal


def fast_forward(module: Any, x: Tensor) -> Tensor:
    """Compute the output of a module that matches."""
    return apply(RmsNorm, x, module.weight, module.variance_epsilon)


class RmsNorm(torch.autograd.Function):
    """What `reference` computes; the gradient reaches `x` alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide, weight = _wide(x), weight.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide, weighted = x.float(), _wide(gradient).mul_(weight)
        along = (wide * weighted).sum(-1, keepdim=True)
        along.mul_(scale).mul_(scale).div_(-x.shape[-1])
        return weighted.addcmul_(wide, along).mul_(scale).to(x.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32, copy=True)
