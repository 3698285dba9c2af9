"""Locks between real processes, and checkpoints that belong to what they were made from."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlplora.params.inputs import Splits
from dlplora.scratch import alone, checkpoint_folder, is_awaited, is_held

NAME = "adapter sums"
HOLDER = """
import sys
from pathlib import Path
from dlplora.edge import set_up_process, show_messages
from dlplora.scratch import alone
set_up_process()
show_messages()
with alone(sys.argv[2], scratch=Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.readline()
"""
SPLITS = Splits(train=60, validation=10, test=10, shares=(0.75, 0.1, 0.15), least=(4, 1, 1))

Process = subprocess.Popen[str]
Start = Callable[[], Process]


@pytest.fixture
def start(tmp_path: Path, root: Path) -> Iterator[Start]:
    """Start processes that take the lock, say so, and hold it until their stdin ends."""
    started: list[Process] = []

    def one() -> Process:
        words = [sys.executable, "-c", HOLDER, str(tmp_path), NAME]
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(words, cwd=root, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        )
        return started[-1]

    yield one
    for process in started:
        with process:
            process.kill()


def says(process: Process) -> str:
    """Wait for the next line on stdout."""
    assert process.stdout is not None
    return process.stdout.readline()


def warns(process: Process) -> str:
    """Wait for the next line on stderr."""
    assert process.stderr is not None
    return process.stderr.readline()


def release(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait() == 0


def becomes(awaited: bool, scratch: Path) -> bool:
    """Wait a little until the lock is awaited, or no longer."""
    until = time.monotonic() + 10
    while is_awaited(NAME, scratch=scratch) != awaited and time.monotonic() < until:
        time.sleep(0.01)
    return is_awaited(NAME, scratch=scratch) == awaited


def test_a_second_process_says_who_holds_the_lock_and_waits_for_it(
    tmp_path: Path, start: Start
) -> None:
    assert not is_held(NAME, scratch=tmp_path)
    first = start()
    assert says(first) == "in\n"
    assert is_held(NAME, scratch=tmp_path)
    assert not is_awaited(NAME, scratch=tmp_path)

    second = start()
    assert warns(second) == f"{NAME}: process {first.pid} is at it; waiting\n"
    assert becomes(True, tmp_path)

    release(first)
    assert says(second) == "in\n"
    assert becomes(False, tmp_path)
    release(second)
    assert not is_held(NAME, scratch=tmp_path)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, start: Start) -> None:
    first = start()
    assert says(first) == "in\n"
    second = start()
    warns(second)

    os.kill(first.pid, signal.SIGKILL)

    assert says(second) == "in\n"
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    with alone(NAME, scratch=tmp_path):  # at once
        assert not is_awaited(NAME, scratch=tmp_path)


def test_a_lock_is_awaited_as_long_as_anyone_waits(tmp_path: Path, start: Start) -> None:
    with alone(NAME, scratch=tmp_path):
        waiting = [start(), start()]
        for process in waiting:
            assert f"process {os.getpid()} is at it" in warns(process)
        assert becomes(True, tmp_path)
    deadline = time.monotonic() + 10
    while not (holders := [p for p in waiting if _holder(tmp_path) == p.pid]):
        assert time.monotonic() < deadline
    assert says(holders[0]) == "in\n"
    assert becomes(True, tmp_path)  # by the other, which may have warned and not yet queued

    (other,) = set(waiting) - set(holders)
    other.kill()
    other.wait()
    assert becomes(False, tmp_path)


def _holder(scratch: Path) -> int:
    return int((scratch / "locks" / "adapter-sums.lock").read_text() or 0)


def test_a_lock_is_free_after_an_error_and_locks_of_other_names_are_others(tmp_path: Path) -> None:
    def fail() -> None:
        with alone("one", scratch=tmp_path), alone("two", scratch=tmp_path):
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
    assert not is_awaited("one", scratch=tmp_path)
    assert not is_awaited("three", scratch=tmp_path)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    files = [tmp_path / name for name in ("train", "validation")]
    for file in files:
        file.write_text(file.name)
    return files


def folder_of(
    inputs: list[Path], *, seed: int = 0, splits: Splits = SPLITS, name: str = NAME
) -> Path:
    return checkpoint_folder(
        name,
        params={"seed": seed, "splits": splits},
        inputs=inputs,
        scratch=inputs[0].parent / "scratch",
    )


def test_a_checkpoint_stands_in_the_same_place_for_the_same_run(
    inputs: list[Path], tmp_path: Path
) -> None:
    first = folder_of(inputs)
    moved = [file.rename(file.with_suffix(".moved")) for file in inputs]  # content counts

    assert folder_of(moved) == first
    assert not first.exists()
    assert first.is_relative_to(tmp_path / "scratch" / "checkpoints")


def test_another_seed_param_input_or_name_has_another_place(inputs: list[Path]) -> None:
    folders = [
        folder_of(inputs),
        folder_of(inputs, seed=1),
        folder_of(inputs, splits=SPLITS.model_copy(update={"train": 61})),
        folder_of(inputs, name="adapter other"),
        folder_of(inputs[::-1]),
    ]
    inputs[1].write_text("changed")
    folders.append(folder_of(inputs))

    assert len(set(folders)) == len(folders)


def test_checkpoints_of_other_runs_are_deleted_and_the_own_is_kept(inputs: list[Path]) -> None:
    old, other_task = folder_of(inputs), folder_of(inputs, name="adapter other")
    for folder in (old, other_task, old.with_name(f".{old.name}.123")):  # left by a killed save
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")

    assert folder_of(inputs) == old
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert (old / "state.json").exists()

    folder_of(inputs, seed=1)
    assert list(old.parent.iterdir()) == []
    assert (other_task / "state.json").exists()
