"""The one optimiser loop: steps, schedule, validation, and the best weights kept."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dlplora.records.training import Curve, CurvePoint

MAX_GRADIENT_NORM = 1.0
OnStep = Callable[[CurvePoint], None]


def fit(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[int], Tensor],
    *,
    validation_loss: Callable[[], float],
    steps: int,
    learning_rate: float,
    warmup_steps: int,
    validate_every: int,
    patience: int | None,
    on_step: OnStep,
) -> Curve:
    """Minimise `loss(step)` by AdamW and leave the weights of the lowest validation loss.

    The learning rate rises over the warm-up and then falls to zero on a straight line.
    Validation runs before the first step, every `validate_every` steps and after the last;
    training ends early after `patience` of them without a new best, or never if it is None.
    """
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    best_loss, best_step = validation_loss(), 0
    best = [parameter.detach().clone() for parameter in parameters]
    points = [CurvePoint(0, None, best_loss)]
    without_best = 0
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * rate_at(step, steps=steps, warmup_steps=warmup_steps)
        optimiser.zero_grad(set_to_none=True)
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimiser.step()
        measured = None
        if step % validate_every == 0 or step == steps:
            measured = validation_loss()
            without_best += 1
            if measured < best_loss:
                best_loss, best_step, without_best = measured, step, 0
                best = [parameter.detach().clone() for parameter in parameters]
        points.append(CurvePoint(step, value.item(), measured))
        on_step(points[-1])
        if patience is not None and without_best >= patience:
            break
    with torch.no_grad():
        for parameter, kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)
    return Curve(tuple(points), best_step)


def rate_at(step: int, *, steps: int, warmup_steps: int) -> float:
    """Return the share of the learning rate at a step, counted from 1: warm-up, then decay."""
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    return (steps - step + 1) / (steps - warmup_steps)
