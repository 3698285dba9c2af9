"""A kernel held against its reference: values and gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_BFLOAT16 = 2**-7  # of a norm; a rounding is half of it


def assert_like_reference(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *,
    learned: Sequence[Tensor],
    fixed: Sequence[object],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Compare both on `learned` – in a dtype, with gradients – and `fixed`, in this order.

    In bfloat16 the reference computes in float32, from the same rounded tensors.
    """
    learned = [one.to(dtype) for one in learned]
    fixed = [one.to(dtype) if isinstance(one, Tensor) else one for one in fixed]
    found = _value_and_gradients(kernel, learned, fixed)
    wide = [
        [one.float() if isinstance(one, Tensor) else one for one in part]
        for part in (learned, fixed)
    ]
    expected = _value_and_gradients(reference, *wide)  # type: ignore[arg-type]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        else:
            assert (one.float() - other).norm() <= _BFLOAT16 * other.norm()


def _value_and_gradients(
    function: Callable[..., Tensor], learned: Sequence[Tensor], fixed: Sequence[object]
) -> list[Tensor]:
    inputs = [one.detach().requires_grad_() for one in learned]
    value = function(*inputs, *fixed)
    weights = torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), inputs)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Draw a tensor of normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
