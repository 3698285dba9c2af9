"""The one optimiser loop: steps, schedule, validation, the best weights kept, and going on."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from math import isfinite

import torch
from torch import Tensor, nn

from dlplora.errors import TrainingError
from dlplora.params.routing import TunedEmbedder
from dlplora.params.training import Adapter
from dlplora.records.training import Curve, CurvePoint
from dlplora.training.checkpoint import Checkpoint, Progress

logger = logging.getLogger(__name__)
MAX_GRADIENT_NORM = 1.0
Batch = Sequence[int]
OnStep = Callable[[CurvePoint], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    The learning rate rises over the warm-up and then falls to zero on a straight line.
    Validation runs before the first step, every `validate_every` steps and after the last;
    training ends early after `patience` of them without a new best, or never if it is None.
    """

    steps: int
    learning_rate: float
    warmup_steps: int
    validate_every: int
    patience: int | None

    @classmethod
    def of(cls, params: Adapter | TunedEmbedder) -> "Schedule":
        """Return the schedule that a section of params names."""
        return cls(**{field.name: getattr(params, field.name) for field in fields(cls)})


def fit(
    parameters: Sequence[nn.Parameter],
    backward: Callable[[int, Batch], float],
    batches: Iterator[Batch],
    *,
    validation_loss: Callable[[], float],
    schedule: Schedule,
    checkpoint: Checkpoint | None,
    on_step: OnStep,
    title: str,
) -> Curve:
    """Minimise a loss by AdamW and leave the weights of the lowest validation loss.

    `backward(step, batch)` adds the gradients of a batch and returns its loss; the rows of a
    batch come from `batches`. With a checkpoint, a training that was killed goes on where it
    was last saved, with the same result. Raises `TrainingError` if a loss or gradient is not
    finite; `title` names the training there.
    """
    training = _Training(parameters, schedule)
    if checkpoint is not None and training.resume(checkpoint):
        logger.info("%s: going on after step %d", title, training.step)
        for point in training.points[1:]:
            on_step(point)
    else:
        training.judge(0, None, _finite(validation_loss(), title, 0, "validation loss", schedule))
    for batch in islice(batches, training.step, None):
        if training.is_over():
            break
        step = training.step + 1
        training.set_rate(step)
        value = _finite(backward(step, batch), title, step, "loss", schedule)
        norm = nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        _finite(norm.item(), title, step, "norm of the gradients", schedule)
        training.optimiser.step()
        measured = None
        if step % schedule.validate_every == 0 or step == schedule.steps:
            measured = _finite(validation_loss(), title, step, "validation loss", schedule)
        on_step(training.judge(step, value, measured))
        if checkpoint is not None and (checkpoint.is_due() or training.is_over()):
            checkpoint.save(training.progress())
    return training.finish()


class _Training:
    """Parameters under an optimiser, with the best of them so far."""

    def __init__(self, parameters: Sequence[nn.Parameter], schedule: Schedule) -> None:
        self.parameters = parameters
        self.schedule = schedule
        self.optimiser = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0)
        self.points: list[CurvePoint] = []
        self.best: list[Tensor] = []
        self.best_loss, self.best_step = float("inf"), 0
        self.without_best = 0

    @property
    def step(self) -> int:
        """The last step that was done."""
        return self.points[-1].step if self.points else 0

    def is_over(self) -> bool:
        """Tell whether all steps are done, or patience is out."""
        patience = self.schedule.patience
        out_of_patience = patience is not None and self.without_best >= patience
        return self.step >= self.schedule.steps or out_of_patience

    def set_rate(self, step: int) -> None:
        """Prepare the optimiser for a step."""
        share = rate_at(step, steps=self.schedule.steps, warmup_steps=self.schedule.warmup_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.learning_rate * share
        self.optimiser.zero_grad(set_to_none=True)

    def judge(self, step: int, loss: float | None, validation_loss: float | None) -> CurvePoint:
        """Note a step; keep the weights if its validation loss is the lowest."""
        self.points.append(CurvePoint(step, loss, validation_loss))
        if validation_loss is not None:
            self.without_best += step > 0
            if validation_loss < self.best_loss:
                self.best_loss, self.best_step, self.without_best = validation_loss, step, 0
                self.best = [parameter.detach().clone() for parameter in self.parameters]
        return self.points[-1]

    def progress(self) -> Progress:
        """Return all that the rest of the training depends on."""
        return Progress(
            parameters=[parameter.detach() for parameter in self.parameters],
            best=self.best,
            moments=[
                {name: value.detach() for name, value in self.optimiser.state[parameter].items()}
                for parameter in self.parameters
            ],
            best_loss=self.best_loss,
            without_best=self.without_best,
            curve=Curve(tuple(self.points), self.best_step),
        )

    def resume(self, checkpoint: Checkpoint) -> bool:
        """Go back to where a checkpoint was saved; tell whether there was one."""
        saved = checkpoint.load()
        if saved is None:
            return False
        with torch.no_grad():
            for parameter, value in zip(self.parameters, saved.parameters, strict=True):
                parameter.copy_(value)
        for parameter, moments in zip(self.parameters, saved.moments, strict=True):
            self.optimiser.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device)
                for name, value in moments.items()
            }
        self.best = [
            value.to(parameter.device)
            for parameter, value in zip(self.parameters, saved.best, strict=True)
        ]
        self.best_loss, self.without_best = saved.best_loss, saved.without_best
        self.points, self.best_step = list(saved.curve.points), saved.curve.best_step
        return True

    def finish(self) -> Curve:
        """Put the best weights into the parameters."""
        with torch.no_grad():
            for parameter, kept in zip(self.parameters, self.best, strict=True):
                parameter.copy_(kept)
        return Curve(tuple(self.points), self.best_step)


def _finite(value: float, title: str, step: int, what: str, schedule: Schedule) -> float:
    if not isfinite(value):
        raise TrainingError(
            f"{title}: step {step} of {schedule.steps}: the {what} is {value}; lower the learning "
            f"rate ({schedule.learning_rate:g}) or set runtime.dtype to float32"
        )
    return value


def rate_at(step: int, *, steps: int, warmup_steps: int) -> float:
    """Return the share of the learning rate at a step, counted from 1: warm-up, then decay."""
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    return (steps - step + 1) / (steps - warmup_steps)
