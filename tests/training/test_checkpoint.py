"""Trainings that are stopped and go on, against the same trainings without a stop."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dlplora.data.balance import Labelled
from dlplora.data.batches import batch_order
from dlplora.params.routing import EncoderRouter, MlpRouter, RouterParams
from dlplora.params.training import Adapter
from dlplora.records.examples import Example
from dlplora.records.training import Curve, CurvePoint
from dlplora.training.adapter import train_adapter
from dlplora.training.checkpoint import Checkpoint, Progress, checkpointed
from dlplora.training.loop import Batch, OnStep, Schedule, fit
from dlplora.training.router import train_router
from tests.tiny import choices, opposites, tiny_base, write_tiny_tokenizer
from tests.tiny_encoders import write_tiny_encoder

STEPS = 12
WHOLE = Schedule(STEPS, 0.05, 2, validate_every=3, patience=None)
IMPATIENT = Schedule(60, 0.01, 0, validate_every=2, patience=3)


class StopError(Exception):
    """As whatever may end a training early."""


class StopAfterSaving(Checkpoint):
    """A checkpoint that is saved after each step, and stops the training after one of them."""

    def __init__(self, folder: Path, *, step: int) -> None:
        super().__init__(folder, share=inf, first_seconds=0)
        self.step = step

    def save(self, progress: Progress) -> None:
        super().save(progress)
        if progress.curve.points[-1].step == self.step:
            raise StopError


def every_step(folder: Path) -> Checkpoint:
    return Checkpoint(folder, share=inf, first_seconds=0)


def stop_at(step: int) -> OnStep:
    """Stop a training after a step and before that is saved."""

    def on_step(point: CurvePoint) -> None:
        if point.step == step:
            raise StopError

    return on_step


@dataclass(frozen=True)
class Result:
    """The weights that were kept, the curve, and the steps that were done to get there."""

    weights: list[Tensor]
    curve: Curve
    done: list[int]

    def equals(self, other: "Result") -> bool:
        """Tell whether two trainings ended alike, bit for bit."""
        weights = zip(self.weights, other.weights, strict=True)
        return self.curve == other.curve and all(torch.equal(a, b) for a, b in weights)


def train(
    checkpoint: Checkpoint | None,
    schedule: Schedule = WHOLE,
    *,
    on_step: OnStep = lambda _: None,
) -> Result:
    """Fit a small network with dropout to noise around 1, which it soon learns too well."""
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(1, size=(40, width))).float() for width in (4, 1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 1))
    parameters = list(model.parameters())
    done = []

    def backward(step: int, rows: Batch) -> float:
        done.append(step)
        model.train()
        loss = functional.mse_loss(model(x[list(rows)]), y[list(rows)])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    @torch.no_grad()
    def validation_loss() -> float:
        return functional.mse_loss(model.eval()(x[30:]), y[30:]).item()

    curve = fit(
        parameters,
        backward,
        batch_order([1] * 30, 8, seed=0),
        validation_loss=validation_loss,
        schedule=schedule,
        checkpoint=checkpoint,
        on_step=on_step,
        title="training",
    )
    return Result([parameter.detach() for parameter in parameters], curve, done)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_training_stopped_at_any_step_ends_as_one_that_was_not(tmp_path: Path, step: int) -> None:
    with pytest.raises(StopError):
        train(every_step(tmp_path / "state"), on_step=stop_at(step))
    torch.rand(7)  # another process has drawn other numbers

    resumed = train(every_step(tmp_path / "state"))

    assert resumed.equals(train(None))
    assert resumed.done == list(range(step, STEPS + 1))  # the step that was not saved, and on


def test_a_training_stopped_after_every_step_ends_as_one_that_was_not(tmp_path: Path) -> None:
    for step in range(1, STEPS + 1):
        with pytest.raises(StopError):
            train(StopAfterSaving(tmp_path / "state", step=step))
        torch.rand(step)

    resumed = train(every_step(tmp_path / "state"))

    assert resumed.equals(train(None))
    assert resumed.done == []


@pytest.mark.parametrize("from_best", [-2, -1, 0, 1, 2, 5, 6])
def test_patience_counts_on_over_a_stop(tmp_path: Path, from_best: int) -> None:
    expected = train(None, IMPATIENT)
    last, best = expected.curve.points[-1].step, expected.curve.best_step
    assert 2 < best < last == best + 6 < IMPATIENT.steps
    with pytest.raises(StopError):
        train(StopAfterSaving(tmp_path / "state", step=best + from_best), IMPATIENT)
    torch.rand(7)

    resumed = train(every_step(tmp_path / "state"), IMPATIENT)

    assert resumed.equals(expected)
    assert resumed.done == list(range(best + from_best + 1, last + 1))


def test_a_finished_training_is_taken_as_it_is(tmp_path: Path) -> None:
    first = train(every_step(tmp_path / "state"))
    files = {path: path.read_bytes() for path in (tmp_path / "state").iterdir()}

    again = train(every_step(tmp_path / "state"))

    assert again.equals(first)
    assert again.done == []
    assert files == {path: path.read_bytes() for path in (tmp_path / "state").iterdir()}


def test_the_steps_before_a_stop_are_told_again(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        train(StopAfterSaving(tmp_path / "state", step=8))
    told: list[CurvePoint] = []

    resumed = train(every_step(tmp_path / "state"), on_step=told.append)

    assert told == list(resumed.curve.points[1:])


def test_when_little_time_goes_by_only_the_end_is_saved(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state", first_seconds=3600)
    with pytest.raises(StopError):
        train(checkpoint, on_step=stop_at(STEPS))
    assert not (tmp_path / "state").exists()

    train(checkpoint)

    assert train(checkpoint).done == []


@pytest.mark.parametrize(("took", "due_in"), [(0.5, 25.0), (5.0, 60.0)])
def test_the_next_save_is_due_by_what_the_last_one_took_and_within_a_minute(
    tmp_path: Path, took: float, due_in: float
) -> None:
    train(every_step(tmp_path / "other"))
    progress = every_step(tmp_path / "other").load()
    assert progress is not None
    saved = 101 + took
    clock = iter((100.0, 100.9, 101.0, 101.0, saved, saved + due_in - 0.1, saved + due_in))
    checkpoint = Checkpoint(
        tmp_path / "state", share=0.02, first_seconds=1.0, clock=partial(next, clock)
    )
    assert not checkpoint.is_due()
    assert checkpoint.is_due()
    checkpoint.save(progress)
    assert not checkpoint.is_due()
    assert checkpoint.is_due()


def test_a_training_that_goes_on_saves_its_first_state_soon(tmp_path: Path) -> None:
    now = 0.0
    checkpoint = Checkpoint(tmp_path / "state", clock=lambda: now)
    assert not checkpoint.is_due()
    now = 1.0
    assert checkpoint.is_due()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def take_keys(file: Path) -> None:
    file.write_bytes(b"{}")


def scramble(file: Path) -> None:
    file.write_bytes(bytes(reversed(range(256))))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("state.safetensors", each) for each in (cut, flip, empty, take_keys, scramble)),
        *(("state.json", each) for each in (cut, empty, take_keys, scramble)),
        *((name, Path.unlink) for name in ("state.safetensors", "state.json")),
    ],
)
def test_a_damaged_state_counts_as_none(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    with pytest.raises(StopError):
        train(StopAfterSaving(tmp_path / "state", step=8))
    damage(tmp_path / "state" / name)

    again = train(every_step(tmp_path / "state"))

    assert again.equals(train(None))
    assert again.done == list(range(1, STEPS + 1))


def test_a_state_is_dropped_on_success_and_kept_on_failure_or_demand(tmp_path: Path) -> None:
    folder = tmp_path / "state"

    def run(*, keep: bool, on_step: OnStep = lambda _: None) -> None:
        with checkpointed(folder, keep=lambda: keep) as checkpoint:
            checkpoint.save(progress)
            train(checkpoint, on_step=on_step)

    train(every_step(folder))
    progress = every_step(folder).load()
    assert progress is not None
    with pytest.raises(StopError):
        run(keep=False, on_step=stop_at(STEPS))
    assert folder.is_dir()
    run(keep=True)
    assert folder.is_dir()
    run(keep=False)
    assert not folder.exists()


ADAPTER = Adapter(
    target_modules=["q_proj", "v_proj"],
    rank=4,
    alpha=8,
    dropout=0.2,
    learning_rate=1e-2,
    warmup_steps=1,
    steps=20,
    batch_size=4,
    micro_batch_size="auto",
    max_tokens=64,
    validate_every=2,
    patience=None,
    share_prefix="exact",
    reworded=0.0,
)
EXAMPLES = [
    Example(
        id=f"{place:064x}",
        task="opposites",
        question=str(item["Q"]),
        answers=(str(item["A"]), "no"),  # so that what is learned depends on the step's number
        options=None,
        bare=None,
    )
    for place, item in enumerate(opposites(40))
]


def save_adapter(
    out: Path,
    checkpoint: Checkpoint | None,
    *,
    advance: Callable[..., None] = lambda **_: None,
    steps: int = ADAPTER.steps,
) -> dict[str, bytes]:
    """Train an adapter with dropout on a tiny Llama; return what its files hold."""
    train_adapter(
        tiny_base(),
        EXAMPLES[:30],
        EXAMPLES[30:],
        name="opposites",
        params=ADAPTER.model_copy(update={"steps": steps}),
        seed=0,
        kernels="auto",
        checkpoint=checkpoint,
        advance=advance,
    ).save(out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("step", [1, 4])
def test_an_adapter_stopped_on_the_way_has_the_same_bytes(tmp_path: Path, step: int) -> None:
    with pytest.raises(StopError):
        save_adapter(tmp_path / "none", StopAfterSaving(tmp_path / "state", step=step), steps=5)
    assert not (tmp_path / "none").exists()
    torch.rand(7)

    resumed = save_adapter(tmp_path / "resumed", every_step(tmp_path / "state"), steps=5)

    assert resumed == save_adapter(tmp_path / "whole", None, steps=5)
    assert len(resumed) == 3


SCRIPT = """
import sys
from pathlib import Path
import torch
from tests.training.test_checkpoint import every_step, save_adapter
torch.set_num_threads(2)
state, out = map(Path, sys.argv[1:])
save_adapter(out, every_step(state), advance=lambda **_: print("step", flush=True))
"""


def test_an_adapter_whose_process_was_killed_has_the_same_bytes(tmp_path: Path, root: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "state"), str(tmp_path / "none")]
    with subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(5):
            assert process.stdout.readline() == b"step\n"
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "none").exists()
    saved = every_step(tmp_path / "state").load()
    assert saved is not None
    assert 4 <= saved.curve.points[-1].step < ADAPTER.steps

    resumed = save_adapter(tmp_path / "resumed", every_step(tmp_path / "state"))

    assert resumed == save_adapter(tmp_path / "whole", None)


ROUTER = MlpRouter(
    kind="mlp",
    reads="data/base",
    parameters=4000,
    hidden=16,
    max_tokens=12,
    learning_rate=0.05,
    batch_size=16,
    epochs=8,
    patience=4,
)
TEXTS = [
    Labelled(str(item["Q"]), task)
    for task, items in (("opposites", opposites(40)), ("choices", choices(40)))
    for item in items
]


ENCODER = EncoderRouter(
    kind="encoder",
    reads="data/embedders/tiny",
    max_tokens=12,
    learning_rate=0.01,
    batch_size=16,
    epochs=4,
    patience=4,
)


def save_router(
    out: Path, params: RouterParams, reads: Path, checkpoint: Checkpoint | None
) -> dict[str, bytes]:
    """Train a router; return what its files hold."""
    train_router(
        TEXTS[::2],
        TEXTS[1::2],
        params,
        no_task=["strange"],
        reads=reads,
        seed=0,
        checkpoint=checkpoint,
        title="router",
        advance=lambda **_: None,
    ).save(out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("params", [ROUTER, ENCODER], ids=lambda params: params.kind)
@pytest.mark.parametrize("step", [1, 6])
def test_a_router_stopped_on_the_way_has_the_same_bytes(
    params: RouterParams, tmp_path: Path, step: int
) -> None:
    reads = tmp_path / "reads"
    if params.kind == "encoder":
        write_tiny_encoder(reads, "bert")
    else:
        write_tiny_tokenizer(reads)
    with pytest.raises(StopError):
        save_router(
            tmp_path / "none", params, reads, StopAfterSaving(tmp_path / "state", step=step)
        )
    torch.rand(7)

    resumed = save_router(tmp_path / "resumed", params, reads, every_step(tmp_path / "state"))

    assert resumed == save_router(tmp_path / "whole", params, reads, None)
