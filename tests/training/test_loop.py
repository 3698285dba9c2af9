"""The optimiser loop against Adam written out, and its rules for the best weights."""

from collections.abc import Callable
from itertools import repeat

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from dlplora.errors import TrainingError
from dlplora.records.training import Curve, CurvePoint
from dlplora.training.loop import MAX_GRADIENT_NORM, Batch, Schedule, fit, rate_at

STEPS, WARMUP, LEARNING_RATE = 12, 3, 0.05


class LeastSquares:
    """y = X w with a batch of its own for every step."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(STEPS, 8, 3))
        self.y = self.x @ np.array([2.0, -1.0, 0.05]) + 0.01 * rng.normal(size=(STEPS, 8))

    def loss(self, weights: nn.Parameter, step: int) -> Tensor:
        x, y = torch.from_numpy(self.x[step - 1]), torch.from_numpy(self.y[step - 1])
        return ((x @ weights - y) ** 2).mean()

    def gradient(self, weights: NDArray[np.float64], step: int) -> NDArray[np.float64]:
        x, y = self.x[step - 1], self.y[step - 1]
        return 2 * x.T @ (x @ weights - y) / len(y)


def adam(problem: LeastSquares, rates: list[float]) -> list[NDArray[np.float64]]:
    """Return the weights after each step of Adam with clipped gradients, from its formula."""
    weights, mean, square = np.zeros(3), np.zeros(3), np.zeros(3)
    path = []
    for step, rate in enumerate(rates, start=1):
        gradient = problem.gradient(weights, step)
        gradient = gradient * min(1.0, MAX_GRADIENT_NORM / np.linalg.norm(gradient))
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        move = (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        weights = weights - LEARNING_RATE * rate * move
        path.append(weights)
    return path


def backward_of(loss: Callable[[int], Tensor]) -> Callable[[int, Batch], float]:
    """Make a `backward` of the loss of a step."""

    def backward(step: int, _: Batch) -> float:
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    return backward


def test_fit_equals_adam_written_out_with_the_same_schedule() -> None:
    problem = LeastSquares()
    weights = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    told: list[CurvePoint] = []
    countdown = iter(range(100, 0, -1))  # ever better, so that the last weights are kept

    curve = fit(
        [weights],
        backward_of(lambda step: problem.loss(weights, step)),
        repeat([]),
        validation_loss=lambda: float(next(countdown)),
        schedule=Schedule(STEPS, LEARNING_RATE, WARMUP, validate_every=5, patience=None),
        checkpoint=None,
        on_step=told.append,
        title="training",
    )

    rates = [1 / 4, 2 / 4, 3 / 4, *(left / 9 for left in range(9, 0, -1))]
    path = adam(problem, rates)
    norms = [
        np.linalg.norm(problem.gradient(at, step))
        for step, at in enumerate([np.zeros(3), *path[:-1]], start=1)
    ]
    assert max(norms) > MAX_GRADIENT_NORM  # clipping took part
    np.testing.assert_allclose(weights.detach().numpy(), path[-1], rtol=1e-5)
    losses = [
        np.mean((problem.x[step] @ at - problem.y[step]) ** 2)
        for step, at in enumerate([np.zeros(3), *path[:-1]])
    ]
    assert [point.loss for point in curve.points[1:]] == pytest.approx(losses, rel=1e-5)
    assert curve.best_step == STEPS
    assert told == list(curve.points[1:])


def test_validation_runs_before_the_first_step_at_intervals_and_after_the_last() -> None:
    curve, _, _ = scripted([9.0, 8.0, 7.0, 6.0], steps=7, validate_every=3)

    measured = {p.step: p.validation_loss for p in curve.points if p.validation_loss is not None}
    assert measured == {0: 9.0, 3: 8.0, 6: 7.0, 7: 6.0}
    assert curve.points[0].loss is None
    assert [point.step for point in curve.points] == list(range(8))


def test_the_best_weights_are_kept_when_the_validation_loss_gets_worse_later() -> None:
    curve, seen, last = scripted([5.0, 3.0, 1.0, 2.0, 4.0], steps=8, validate_every=2)

    assert curve.best_step == 4
    assert last == seen[2]
    assert last not in (seen[0], seen[1], seen[3], seen[4])


def test_the_initial_weights_are_kept_when_no_step_is_better() -> None:
    curve, seen, last = scripted([1.0, 1.5, 2.0], steps=2, validate_every=1)

    assert (curve.best_step, last) == (0, seen[0])


def test_of_equally_good_weights_the_earlier_are_kept() -> None:
    curve, seen, last = scripted([3.0, 1.0, 1.0], steps=2, validate_every=1)

    assert (curve.best_step, last) == (1, seen[1])


@pytest.mark.parametrize(
    ("losses", "patience", "ends_at"),
    [
        ([5.0, 4.0, 6.0, 6.0, 1.0, 1.0], 2, 6),
        ([5.0, 4.0, 6.0, 3.0, 6.0, 6.0], 2, 10),
        ([5.0, 5.0, 1.0, 1.0, 1.0, 1.0], 1, 2),
        ([5.0, 6.0, 6.0, 6.0, 6.0, 6.0], None, 10),
    ],
)
def test_training_ends_after_patience_validations_without_a_new_best(
    losses: list[float], patience: int | None, ends_at: int
) -> None:
    curve, seen, last = scripted(losses, steps=10, validate_every=2, patience=patience)

    assert curve.points[-1].step == ends_at
    assert len(seen) == 1 + ends_at // 2
    best = min(range(len(seen)), key=losses.__getitem__)
    assert (curve.best_step, last) == (2 * best, seen[best])


def scripted(
    losses: list[float], *, steps: int, validate_every: int, patience: int | None = None
) -> tuple[Curve, list[float], float]:
    """Fit one number while validation says what it is told.

    Returns the curve, the number at each validation, and the number that was kept.
    """
    weight = nn.Parameter(torch.tensor(10.0))
    seen: list[float] = []

    def validation_loss() -> float:
        seen.append(weight.item())
        return losses[len(seen) - 1]

    curve = fit(
        [weight],
        backward_of(lambda _: weight**2),
        repeat([]),
        validation_loss=validation_loss,
        schedule=Schedule(steps, 0.1, 0, validate_every=validate_every, patience=patience),
        checkpoint=None,
        on_step=lambda _: None,
        title="training",
    )
    assert len(set(seen)) == len(seen)  # every step moved the number
    return curve, seen, weight.item()


def test_every_step_is_given_the_next_batch() -> None:
    weight = nn.Parameter(torch.tensor(1.0))
    seen: list[tuple[int, Batch]] = []

    def backward(step: int, batch: Batch) -> float:
        seen.append((step, batch))
        return backward_of(lambda _: weight**2)(step, batch)

    fit(
        [weight],
        backward,
        ([number] for number in range(100)),
        validation_loss=lambda: 1.0,
        schedule=Schedule(4, 0.1, 0, validate_every=2, patience=None),
        checkpoint=None,
        on_step=lambda _: None,
        title="training",
    )

    assert seen == [(1, [0]), (2, [1]), (3, [2]), (4, [3])]


def diverging(
    *, loss: Callable[[nn.Parameter, int], Tensor], validation: Callable[[], float] = lambda: 1.0
) -> tuple[str, list[CurvePoint]]:
    """Fit until it fails; return the error's text and the steps that were done."""
    weight = nn.Parameter(torch.tensor(1.0))
    told: list[CurvePoint] = []
    with pytest.raises(TrainingError) as caught:
        fit(
            [weight],
            backward_of(lambda step: loss(weight, step)),
            repeat([]),
            validation_loss=validation,
            schedule=Schedule(8, 0.125, 0, validate_every=2, patience=None),
            checkpoint=None,
            on_step=told.append,
            title="adapter sums",
        )
    assert weight.isfinite()  # the bad step was not taken
    return str(caught.value), told


ADVICE = "; lower the learning rate (0.125) or set runtime.dtype to float32"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_names_training_step_and_advice(bad: float) -> None:
    message, told = diverging(loss=lambda weight, step: weight * (bad if step == 3 else 1.0))

    assert message == f"adapter sums: step 3 of 8: the loss is {bad}" + ADVICE
    assert [point.step for point in told] == [1, 2]


def test_gradients_that_are_not_finite_name_training_step_and_advice() -> None:
    def loss(weight: nn.Parameter, step: int) -> Tensor:
        return (weight - weight).abs().sqrt() if step == 4 else weight**2  # 0 / 0 behind √

    message, told = diverging(loss=loss)

    assert message == "adapter sums: step 4 of 8: the norm of the gradients is nan" + ADVICE
    assert [point.step for point in told] == [1, 2, 3]


@pytest.mark.parametrize(("place", "step"), [(0, 0), (1, 2), (4, 8)])
def test_a_validation_loss_that_is_not_finite_names_training_step_and_advice(
    place: int, step: int
) -> None:
    losses = [3.0, 2.0, 1.0, 0.5, 0.25]
    losses[place] = float("nan")
    told = iter(losses)

    message, _ = diverging(loss=lambda weight, _: weight**2, validation=lambda: next(told))

    assert message == f"adapter sums: step {step} of 8: the validation loss is nan" + ADVICE


def test_the_rate_rises_over_the_warm_up_and_falls_on_a_straight_line() -> None:
    rates = [rate_at(step, steps=9, warmup_steps=4) for step in range(1, 10)]

    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_without_warm_up_the_rate_starts_at_its_peak() -> None:
    rates = [rate_at(step, steps=4, warmup_steps=0) for step in range(1, 5)]

    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


@settings(deadline=None)
@given(steps=st.integers(1, 300), data=st.data())
def test_the_rate_stays_between_0_and_1_and_peaks_once_at_1(
    steps: int, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(0, steps - 1))

    rates = [rate_at(step, steps=steps, warmup_steps=warmup) for step in range(1, steps + 1)]

    assert all(0 < rate <= 1 for rate in rates)
    assert [place for place, rate in enumerate(rates, start=1) if rate == 1] == [warmup + 1]
    rise, fall = np.diff(rates[: warmup + 1]), np.diff(rates[warmup:])
    np.testing.assert_allclose(rise, 1 / (warmup + 1))
    np.testing.assert_allclose(fall, -1 / (steps - warmup))
