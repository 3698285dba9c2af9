"""Gradients in micro-batches against those of the whole batch, and batches that do not fit."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dlplora.errors import TrainingError
from dlplora.runtime import is_out_of_memory
from dlplora.training.micro_batches import MicroBatches

CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
)
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError(CPU_ERROR),
]


@dataclass(frozen=True)
class Row:
    """Inputs (T, 3) and targets (T); a row weighs as many as it has targets."""

    x_TI: Tensor
    y_T: Tensor


def weigh(row: Row) -> int:
    return len(row.y_T)


class Problem:
    """A small network and rows of 1 to 6 targets; more than `room` rows at once raise `error`."""

    def __init__(self, num_rows: int = 8) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.parameters = list(self.model.parameters())
        sizes = [1 + number * 5 % 6 for number in range(num_rows)]
        self.rows = [
            Row(torch.randn(size, 3).double(), torch.randn(size).double()) for size in sizes
        ]
        self.room = num_rows
        self.error: Exception = MemoryError()
        self.asked: list[int] = []

    def mean_loss(self, rows: Sequence[Row]) -> Tensor:
        self.asked.append(len(rows))
        if len(rows) > self.room:
            raise self.error
        x_TI, y_T = torch.cat([row.x_TI for row in rows]), torch.cat([row.y_T for row in rows])
        return ((self.model(x_TI)[:, 0] - y_T) ** 2).mean()

    def whole(self) -> tuple[float, list[Tensor]]:
        """Return the loss and gradients of all rows at once."""
        loss = self.mean_loss(self.rows)
        self.asked.clear()
        return loss.item(), list(torch.autograd.grad(loss, self.parameters))

    def backward(self, micro_batches: MicroBatches) -> float:
        return micro_batches.backward(
            self.rows, self.mean_loss, weight=weigh, parameters=self.parameters
        )

    def check(self, found: float, expected: tuple[float, list[Tensor]]) -> None:
        loss, gradients = expected
        assert found == pytest.approx(loss, rel=1e-12)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def out_of_room(room: int, error: Exception, num_rows: int = 8) -> Problem:
    problem = Problem(num_rows)
    problem.room, problem.error = room, error
    return problem


@pytest.mark.parametrize(
    ("size", "asked"),
    [(1, [1] * 8), (3, [3, 3, 2]), (5, [5, 3]), (8, [8]), (100, [8]), ("auto", [8])],
)
def test_micro_batches_of_any_size_give_the_gradients_of_the_whole_batch(
    size: int | Literal["auto"], asked: list[int]
) -> None:
    problem = Problem()
    assert len(set(map(weigh, problem.rows))) > 3
    expected = problem.whole()

    found = problem.backward(MicroBatches(8, size, "adapter sums"))

    problem.check(found, expected)
    assert problem.asked == asked


@settings(deadline=None, max_examples=25)
@given(num_rows=st.integers(1, 12), size=st.integers(1, 12), room=st.integers(1, 12))
def test_whatever_fits_the_mean_without_gradients_is_that_of_all_rows(
    num_rows: int, size: int, room: int
) -> None:
    problem = Problem(num_rows)
    expected, _ = problem.whole()
    problem.room = room

    found = MicroBatches(size, "auto", "t").mean(problem.rows, problem.mean_loss, weight=weigh)

    assert found == pytest.approx(expected, rel=1e-12)
    assert all(parameter.grad is None for parameter in problem.parameters)
    assert all(asked <= size for asked in problem.asked)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("room", "asked"), [(1, [8, 4, 2, *[1] * 8]), (3, [8, 4, 2, 2, 2, 2])])
def test_micro_batches_that_do_not_fit_are_halved_and_give_the_same_gradients(
    room: int, asked: list[int], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    problem = Problem()
    expected = problem.whole()
    problem.room, problem.error = room, error
    micro_batches = MicroBatches(8, "auto", "adapter sums")

    problem.check(problem.backward(micro_batches), expected)

    assert problem.asked == asked
    told = caplog.messages
    assert told[0] == "adapter sums: out of memory; going on with 4 examples at once"
    assert len(told) == asked.index(micro_batches.size)

    problem.asked.clear()
    problem.check(
        problem.backward(micro_batches), expected
    )  # halved for good, and no gradient twice
    assert set(problem.asked) == {micro_batches.size}


def test_a_micro_batch_that_fails_late_leaves_no_gradients_behind() -> None:
    problem = Problem()
    expected = problem.whole()
    usual = problem.mean_loss

    def mean_loss(rows: Sequence[Row]) -> Tensor:
        if len(problem.asked) == 2:  # after two of the four micro_batches had their backward
            problem.asked.append(0)
            raise MemoryError
        return usual(rows)

    micro_batches = MicroBatches(2, "auto", "adapter sums")
    found = micro_batches.backward(
        problem.rows, mean_loss, weight=weigh, parameters=problem.parameters
    )

    problem.check(found, expected)
    assert problem.asked == [2, 2, 0, *[1] * 8]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_fixed_size_that_does_not_fit_is_refused_in_one_line(error: Exception) -> None:
    problem = out_of_room(3, error)

    with pytest.raises(TrainingError) as caught:
        problem.backward(MicroBatches(8, 4, "adapter sums"))

    assert str(caught.value) == (
        "adapter sums: out of memory with 4 examples at once; lower adapter.max_tokens or use "
        "adapter.micro_batch_size: auto"
    )
    assert problem.asked == [4]


@pytest.mark.parametrize("size", ["auto", 1])
def test_one_row_that_does_not_fit_is_refused_in_one_line(size: int | Literal["auto"]) -> None:
    problem = out_of_room(0, MemoryError())

    with pytest.raises(TrainingError) as caught:
        problem.backward(MicroBatches(8, size, "adapter sums"))

    assert str(caught.value) == (
        "adapter sums: out of memory with 1 example at once; lower adapter.max_tokens or use a "
        "larger machine"
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")]
)
@pytest.mark.parametrize("call", ["backward", "mean"])
def test_other_errors_pass_through_at_once(error: Exception, call: str) -> None:
    problem = out_of_room(0, error)
    micro_batches = MicroBatches(8, "auto", "adapter sums")
    calls: dict[str, Callable[[], float]] = {
        "backward": lambda: problem.backward(micro_batches),
        "mean": lambda: micro_batches.mean(problem.rows, problem.mean_loss, weight=weigh),
    }

    with pytest.raises(type(error)) as caught:
        calls[call]()

    assert caught.value is error
    assert (problem.asked, micro_batches.size) == ([8], 8)


def test_what_torch_raises_without_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_out_of_memory(caught.value)


SCRIPT = """
import resource
import psutil
import torch
from torch import nn
from dlplora.training.micro_batches import MicroBatches
torch.set_num_threads(1)
weight = nn.Parameter(torch.ones(()))
torch.stack([weight] * 2).sum().backward()  # whatever threads torch starts, it has by now
MIB = 2**20
room = psutil.Process().memory_info().vms + 300 * MIB
resource.setrlimit(resource.RLIMIT_AS, (room, room))
micro_batches = MicroBatches(8, "auto", "adapter sums")
loss = micro_batches.backward(
    [1.0] * 8,
    lambda rows: (weight * torch.ones(len(rows), 16 * MIB)).mean(),  # 64 MiB a row, twice
    weight=lambda row: row,
    parameters=[weight],
)
print(micro_batches.size, loss, weight.grad.item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")
def test_memory_that_really_ends_halves_the_micro_batches(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=root,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    size, loss, gradient = done.stdout.split()
    assert int(size) in (1, 2)
    assert (float(loss), float(gradient)) == (1.0, 1.0)
    assert "out of memory; going on with 4 examples at once" in done.stderr
