"""The cross-entropy against torch's own."""

import pytest
import torch

from dlplora.kernels.autograd import apply
from dlplora.kernels.cross_entropy import MeanCrossEntropy, reference


@pytest.mark.parametrize("count", [1, 64, 65, 200])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_value_and_gradient_are_torchs(count: int, share: float) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = (10 * torch.randn(count, 300, generator=generator)).requires_grad_()
    targets = torch.randint(300, (count,), generator=generator)
    expected = reference(logits, targets)
    (to_expected,) = torch.autograd.grad(expected * share, logits)
    found = apply(MeanCrossEntropy, logits, targets)
    (to_found,) = torch.autograd.grad(found * share, logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(to_found, to_expected, atol=1e-7, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(apply(MeanCrossEntropy, logits, targets), expected)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.randn(70, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(70)
    wide = logits.float().requires_grad_()
    expected = reference(wide, targets)
    (to_expected,) = torch.autograd.grad(expected, wide)
    narrow = logits.requires_grad_()
    found = apply(MeanCrossEntropy, narrow, targets)
    (to_found,) = torch.autograd.grad(found, narrow)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(to_found.float(), to_expected, atol=0, rtol=2**-7)  # rounded twice
