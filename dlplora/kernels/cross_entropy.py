"""The mean cross-entropy, log Σ exp(x) − x[target], without a float32 copy of all logits.

Its gradient, (softmax(x) − 1[target]) / n, is computed in the forward pass. The backward pass
scales it in place: it runs once, and not again with `retain_graph`.

Shapes: n tokens, V entries of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_CHUNK = 64  # rows of logits that are float32 at once


def reference(logits_nV: Tensor, targets_n: Tensor) -> Tensor:
    """Return the mean cross-entropy as float32, by torch's own function."""
    return functional.cross_entropy(logits_nV.float(), targets_n)


class MeanCrossEntropy(torch.autograd.Function):
    """What `reference` computes, a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, targets_n: Tensor) -> Tensor:
        losses = torch.empty(len(targets_n), device=logits_nV.device)
        to_logits_nV = torch.empty_like(logits_nV) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets_n), _CHUNK):
            part = slice(start, start + _CHUNK)
            targets = targets_n[part, None]
            logs = logits_nV[part].float().log_softmax(1)
            losses[part] = -logs.gather(1, targets)[:, 0]
            if to_logits_nV is not None:
                shares = logs.exp_()
                shares.scatter_add_(1, targets, shares.new_full(targets.shape, -1.0))
                to_logits_nV[part] = shares
        ctx.save_for_backward(to_logits_nV)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (to_logits_nV,) = ctx.saved_tensors
        return to_logits_nV.mul_(gradient / len(to_logits_nV)), None
