"""Leaner forms of what every layer of a training step repeats: the same sums in fewer passes.

On two cores a third of a plain training step goes into passes over single values and into keys
repeated for heads that share them. In a `lean` block

* batches are packs, in which nothing is padded, and heads that share keys and values (arXiv
  2305.13245) are multiplied with them as rows of one product (`dlplora.training.packing`);
* an adapted linear layer and its low-rank pair (arXiv 2106.09685) add into one output and into
  one gradient, in the dtype of the base, as the engine computes them;
* RMSNorm (arXiv 1910.07467), rotary embeddings (arXiv 2104.09864) and gated units (SwiGLU, arXiv
  2002.05202) have gradients of their own instead of those of a chain of small operations.

A layer that does not compute one of these keeps its own form.

Shapes: n tokens, I inputs, O outputs, R ranks, U units between; H heads of D values.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dlplora.patch import patched
from dlplora.training.autograd import apply
from dlplora.training.packing import packing


@contextmanager
def lean(model: nn.Module) -> Iterator[None]:
    """Compute the layers of a model, with one adapter of PEFT's or none, leaner in the block."""
    with ExitStack() as stack:
        for module in model.modules():
            forward = _lean_forward(module)
            if forward is not None:
                stack.enter_context(patched(module, "forward", forward))
        for home in _homes_of_rotary(model):
            stack.enter_context(patched(home, _ROTARY, _lean_rotary(getattr(home, _ROTARY))))
        stack.enter_context(packing(model))
        yield


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
    if _is_gated(module):
        gated: Any = module
        weights = gated.gate_proj.weight, gated.up_proj.weight, gated.down_proj.weight
        return lambda x: apply(_Gated, x, *weights)
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
        wide, weight = _wide(x), weight.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide, weighed = x.float(), _wide(gradient).mul_(weight)
        along = (wide * weighed).sum(-1, keepdim=True)
        along.mul_(scale).mul_(scale).div_(-x.shape[-1])
        return weighed.addcmul_(wide, along).mul_(scale).to(x.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32, copy=True)


# Classes of transformers whose forward is down(act(gate(x)) * up(x)) and no more: a probe alone
# would miss units that drop in training only, or clamp what is large.
_GATED = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "Olmo2MLP"}


def _is_gated(module: nn.Module) -> bool:
    """Tell whether a module is a gated unit of frozen layers, by its class, parts and result."""
    if type(module).__name__ not in _GATED:
        return False
    parts = dict(module.named_children())
    linear = [parts.pop(name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if len(parts) != 1 or not all(
        type(part) is nn.Linear and part.bias is None and not part.weight.requires_grad
        for part in linear
    ):
        return False
    gate_UI, up_UI, down_IU = (cast(nn.Linear, part).weight for part in linear)
    probe = torch.linspace(-1, 1, 2 * gate_UI.shape[1], dtype=gate_UI.dtype, device=gate_UI.device)
    probe = probe.view(2, -1)
    with torch.no_grad():
        found, own = apply(_Gated, probe, gate_UI, up_UI, down_IU), module(probe)
        return torch.allclose(found, own, rtol=0.01, atol=0.01 * own.abs().max().item())


class _Gated(torch.autograd.Function):
    """W_down (silu(W_gate x) · W_up x), whose gradient reaches x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_UI: Tensor, up_UI: Tensor, down_IU: Tensor) -> Tensor:
        x_nI = x.reshape(-1, x.shape[-1])
        gate_nU, up_nU = x_nI @ gate_UI.T, x_nI @ up_UI.T
        opened_nU = nn.functional.silu(gate_nU)
        y_nI = (opened_nU * up_nU) @ down_IU.T
        ctx.save_for_backward(gate_nU, opened_nU, up_nU, gate_UI, up_UI, down_IU)
        return y_nI.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate_nU, opened_nU, up_nU, gate_UI, up_UI, down_IU = ctx.saved_tensors
        gradient_nU = gradient.reshape(-1, gradient.shape[-1]) @ down_IU
        to_up_nU = gradient_nU * opened_nU
        to_gate_nU = torch.ops.aten.silu_backward(gradient_nU.mul_(up_nU), gate_nU)
        to_x = (to_gate_nU @ gate_UI).addmm_(to_up_nU, up_UI)
        return to_x.view_as(gradient), None, None, None


_ROTARY = "apply_rotary_pos_emb"
Rotary = Callable[..., tuple[Tensor, Tensor]]


def _lean_rotary(own: Rotary) -> Rotary:
    """Return a leaner form of transformers' function; of partly rotated heads it is the own."""

    def rotary(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if len(given) != 4 or named:
            return own(*given, **named)
        query, key, cos, sin = given
        if cos.shape[-1] != query.shape[-1] or cos.dtype != query.dtype:
            return own(*given)
        cos, sin = cos[:, None], sin[:, None]
        return apply(_Rotary, query, cos, sin), apply(_Rotary, key, cos, sin)

    return rotary


def _homes_of_rotary(model: nn.Module) -> set[Any]:
    """Return the modules of transformers whose rotary embedding is the usual one."""
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    return {home for home in homes if hasattr(home, _ROTARY) and _is_usual(getattr(home, _ROTARY))}


def _is_usual(rotary: Rotary) -> bool:
    query_12ND, key_11ND = torch.split(torch.linspace(-1, 1, 36).view(1, 3, 3, 4), [2, 1], 1)
    cos_1ND, sin_1ND = torch.linspace(-0.9, 0.7, 24).view(2, 1, 3, 4)
    probe = (query_12ND, key_11ND, cos_1ND, sin_1ND)
    try:
        own = rotary(*probe)
    except Exception:  # it takes other things
        return False
    if not (isinstance(own, tuple) and [type(part) for part in own] == [Tensor, Tensor]):
        return False
    return all(
        found.shape == other.shape and torch.allclose(found, other)
        for found, other in zip(_lean_rotary(rotary)(*probe), own, strict=True)
    )


class _Rotary(torch.autograd.Function):
    """x · cos + (−b, a) · sin for the halves x = (a, b) of each head; (1, H, n, D)."""

    @staticmethod
    def forward(ctx: Any, x_1HnD: Tensor, cos_11nD: Tensor, sin_11nD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_11nD, sin_11nD)
        of_a, of_b = sin_11nD.chunk(2, -1)
        return _turned(x_1HnD, cos_11nD, of_a, of_b, sign=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1HnD: Tensor) -> tuple[Tensor | None, ...]:
        cos_11nD, sin_11nD = ctx.saved_tensors
        of_a, of_b = sin_11nD.chunk(2, -1)
        return _turned(gradient_1HnD, cos_11nD, of_b, of_a, sign=1), None, None


def _turned(x: Tensor, cos: Tensor, from_b: Tensor, from_a: Tensor, *, sign: int) -> Tensor:
    """Return (a · cos + sign · b · from_b, b · cos − sign · a · from_a)."""
    result = torch.empty_like(x)
    (a, b), (cos_a, cos_b), (new_a, new_b) = (part.chunk(2, -1) for part in (x, cos, result))
    torch.mul(a, cos_a, out=new_a).addcmul_(b, from_b, value=sign)
    torch.mul(b, cos_b, out=new_b).addcmul_(a, from_a, value=-sign)
    return result
