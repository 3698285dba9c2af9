"""Rotary embeddings (arXiv 2104.09864): x · cos + (−b, a) · sin for the halves x = (a, b).

Shapes: B rows, H heads, S tokens, D width of a head.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig

from dlplora.kernels.autograd import apply
from dlplora.kernels.definitions import same

NAME = "apply_rotary_pos_emb"  # of transformers' function, in each file of a family
RotatePair = Callable[..., tuple[Tensor, Tensor]]


def reference(x_BHSD: Tensor, cos_B1SD: Tensor, sin_B1SD: Tensor) -> Tensor:
    """Rotate the vectors of all heads, by plain operations."""
    a, b = x_BHSD.chunk(2, -1)
    return x_BHSD * cos_B1SD + torch.cat([-b, a], -1) * sin_B1SD


def matches(home: ModuleType) -> bool:
    """Tell whether a file's function rotates queries and keys as `reference` does."""
    query_12SD, key_11SD = torch.split(torch.linspace(-1, 1, 36).view(1, 3, 3, 4), [2, 1], 1)
    cos_1SD, sin_1SD = torch.linspace(-0.9, 0.7, 24).view(2, 1, 3, 4)
    try:
        found = getattr(home, NAME)(query_12SD, key_11SD, cos_1SD, sin_1SD)
    except Exception:  # it takes other arguments
        return False
    expected = [reference(x, cos_1SD[:, None], sin_1SD[:, None]) for x in (query_12SD, key_11SD)]
    return (
        isinstance(found, tuple)
        and [type(part) for part in found] == [Tensor, Tensor]
        and all(map(same, found, expected))
    )


def rotates_parts(home: ModuleType, config: PreTrainedConfig) -> bool:
    """Tell whether a file's function, called with whole heads, leaves a part of them as it is."""
    rope = getattr(config, "rope_parameters", None) or {}
    sections = [one for one in (rope, *rope.values()) if isinstance(one, dict)]
    if all((one.get("partial_rotary_factor") or 1) == 1 for one in sections):
        return False
    heads_1H3D = torch.ones(1, 1, 3, 4)
    try:
        getattr(home, NAME)(heads_1H3D, heads_1H3D, *torch.ones(2, 1, 3, 2))
    except Exception:  # the model cuts heads itself
        return False
    return True


def fast_function(home: ModuleType) -> RotatePair:
    """Return the function for a file that matches; the own one rotates parts of heads."""
    own: RotatePair = getattr(home, NAME)

    def rotate_pair(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if len(given) != 4 or named:
            return own(*given, **named)
        query, key, cos, sin = given
        if cos.shape[-1] != query.shape[-1] or cos.dtype != query.dtype:
            return own(*given)
        cos, sin = cos[:, None], sin[:, None]
        return apply(Rotary, query, cos, sin), apply(Rotary, key, cos, sin)

    return rotate_pair


class Rotary(torch.autograd.Function):
    """What `reference` computes; the gradient reaches the vectors alone."""

    @staticmethod
    def forward(ctx: Any, x_BHSD: Tensor, cos_B1SD: Tensor, sin_B1SD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_B1SD, sin_B1SD)
        of_a, of_b = sin_B1SD.chunk(2, -1)
        return _rotated(x_BHSD, cos_B1SD, of_a, of_b, sign=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHSD: Tensor) -> tuple[Tensor | None, ...]:
        cos_B1SD, sin_B1SD = ctx.saved_tensors
        of_a, of_b = sin_B1SD.chunk(2, -1)
        return _rotated(gradient_BHSD, cos_B1SD, of_b, of_a, sign=1), None, None


def _rotated(x: Tensor, cos: Tensor, from_b: Tensor, from_a: Tensor, *, sign: int) -> Tensor:
    """Return (a · cos + sign · b · from_b, b · cos − sign · a · from_a)."""
    result = torch.empty_like(x)
    (a, b), (cos_a, cos_b), (new_a, new_b) = (part.chunk(2, -1) for part in (x, cos, result))
    torch.mul(a, cos_a, out=new_a).addcmul_(b, from_b, value=sign)
    torch.mul(b, cos_b, out=new_b).addcmul_(a, from_a, value=-sign)
    return result
