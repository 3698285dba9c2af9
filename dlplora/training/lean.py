"""Leaner forms of what every layer of a training step repeats: the same sums in fewer passes.

On two cores a third of a plain training step goes into passes over single values and into keys
repeated for heads that share them. In a `lean` block

* batches are packs, in which nothing is padded, and heads that share keys and values (arXiv
  2305.13245) are multiplied with them as rows of one product (`dlplora.training.packing`);
* an adapted linear layer and its low-rank pair (arXiv 2106.09685) add into one output and into
  one gradient, in the dtype of the base, as the engine computes them;
* RMSNorm (arXiv 1910.07467) and the halves of rotary embeddings (arXiv 2104.09864) have gradients
  of their own instead of those of a chain of small operations.

A layer that does not compute one of these keeps its own form.

Shapes: n tokens, I inputs, O outputs, R ranks.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dlplora.training.autograd import apply
from dlplora.training.packing import packing


@contextmanager
def lean(model: nn.Module) -> Iterator[None]:
    """Compute the layers of a model, with one adapter of PEFT's or none, leaner in the block."""
    with ExitStack() as stack:
        stack.enter_context(packing(model))
        for module in model.modules():
            forward = _lean_forward(module)
            if forward is not None:
                stack.enter_context(_replaced(module, "forward", forward))
        for home in _homes_of_rotary(model):
            stack.enter_context(_replaced(home, "rotate_half", _RotateHalf.apply))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Give an object another attribute for the time of a `with` block."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _lean_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """Return a leaner forward of a module, or None if it has to keep its own."""
    if _is_plain_lora(module):
        lora = cast(PeftLinear, module)
        (name,) = lora.active_adapters
        down, up = lora.lora_A[name], lora.lora_B[name]
        return lambda x, *_, **__: apply(
            _LoraLinear, x, lora.base_layer.weight, lora.base_layer.bias, down.weight, up.weight,
            lora.scaling[name],
        )  # fmt: skip
    if _is_rms_norm(module):
        norm: Any = module
        return lambda x: apply(_RmsNorm, x, norm.weight, norm.variance_epsilon)
    return None


def _is_plain_lora(module: nn.Module) -> bool:
    """Tell whether PEFT would add one low-rank pair without dropout to a linear layer."""
    if type(module) is not PeftLinear or module.merged or module.disable_adapters:
        return False
    names = module.active_adapters
    return (
        type(module.base_layer) is nn.Linear
        and len(names) == 1
        and names[0] in module.lora_A
        and not module.lora_variant
        and not module.lora_bias[names[0]]
        and isinstance(module.lora_dropout[names[0]], nn.Identity)
    )


class _LoraLinear(torch.autograd.Function):
    """W0 x + b + s B A x, whose gradient reaches A, B and x."""

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
        y_nO = nn.functional.linear(x_nI, weight_OI, bias_O)
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


def _is_rms_norm(module: nn.Module) -> bool:
    """Tell whether a module is an RMSNorm of the plain kind, by its name, parts and result."""
    parts = dict(module.named_parameters())
    if not (type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")):
        return False
    if list(parts) != ["weight"] or parts["weight"].requires_grad:
        return False
    weight = parts["weight"]
    probe = torch.linspace(-1, 1, 2 * len(weight), dtype=weight.dtype, device=weight.device)
    probe = probe.view(2, -1)
    with torch.no_grad():
        found = apply(_RmsNorm, probe, weight, module.variance_epsilon)
        return torch.allclose(found, module(probe), rtol=0.01, atol=1e-4)


class _RmsNorm(torch.autograd.Function):
    """w x / sqrt(mean(x²) + ε); the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        result: Tensor = weight * (wide * scale).to(x.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide, weighed = x.float(), (gradient * weight).float()
        along = (wide * weighed).sum(-1, keepdim=True)
        along.mul_(scale**3).div_(-x.shape[-1])
        return (wide * along).addcmul_(weighed, scale).to(x.dtype), None, None


def _homes_of_rotary(model: nn.Module) -> set[Any]:
    """Return the modules of transformers whose `rotate_half` is the usual one."""
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    probe = torch.arange(4.0)
    return {
        home
        for home in homes
        if (own := getattr(home, "rotate_half", None)) is not None
        and torch.equal(own(probe), torch.tensor([-2.0, -3.0, 0.0, 1.0]))
    }


class _RotateHalf(torch.autograd.Function):
    """(a, b) → (−b, a), over the halves of the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        half = gradient.shape[-1] // 2
        return torch.cat((gradient[..., half:], -gradient[..., :half]), -1)
