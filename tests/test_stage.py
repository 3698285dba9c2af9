"""The edge of a stage: what goes wrong is one line, and one run at a time."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError

from dlplora.errors import DataError
from dlplora.records.files import read_table, write_json, write_table, written_folder
from dlplora.records.training import AdapterTraining, Curve
from dlplora.scratch import is_awaited
from dlplora.stage import progress, run
from dlplora.training.adapter import TrainedAdapter
from tests.tiny import tiny_model
from tests.waiting import until as wait_until

until = partial(wait_until, within=60)
RunStage = Callable[..., tuple[object, str]]


@pytest.fixture
def run_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> RunStage:
    """Run a stage's `main` on words; return its exit code and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def call(main: Callable[..., None], *words: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["tasks/stage.py", *words])
        code: object = 0
        try:
            run(main)
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().err

    return call


def raising(error: Exception) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


def test_a_stage_gets_its_words_and_ends_well(run_stage: RunStage, tmp_path: Path) -> None:
    def main(name: str, out: Path) -> None:
        out.write_text(name)

    assert run_stage(main, "sums", "out.txt") == (0, "")
    assert (tmp_path / "out.txt").read_text() == "sums"


def test_an_error_of_ours_is_one_line(run_stage: RunStage) -> None:
    code, told = run_stage(raising(DataError("data/raw/x.json: item 3\nhas no Q")))

    assert (code, told) == (1, "error: data/raw/x.json: item 3 has no Q\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "data/x"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "data/x"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_one_line(run_stage: RunStage, error: Exception) -> None:
    code, told = run_stage(raising(error))

    assert code == 1
    assert told == f"error: no space left on the disk: {error}; free some and run again\n"


@pytest.mark.parametrize(
    "error", [KeyError("Q"), OSError(errno.EACCES, "denied"), RuntimeError("x")]
)
def test_what_is_no_mistake_of_the_user_passes_through(
    run_stage: RunStage, error: Exception
) -> None:
    with pytest.raises(type(error)) as caught:
        run_stage(raising(error))
    assert caught.value is error


SLOW = """
import time
from pathlib import Path
from dlplora.stage import progress, run

def main(name: str) -> None:
    with Path("log").open("a") as log:
        print("begin", name, file=log, flush=True)
        while not Path("go").exists():
            time.sleep(0.01)
        print("end", name, file=log, flush=True)

if __name__ == "__main__":
    run(main)
"""


def test_two_runs_of_a_stage_go_one_after_the_other_and_other_items_at_once(
    tmp_path: Path, root: Path
) -> None:
    (tmp_path / "adapter.py").write_text(SLOW)

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "adapter.py", name],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(root)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def begun() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    log = tmp_path / "log"
    processes = [start("sums")]
    until(lambda: begun() == ["begin sums"])
    processes += [start("sums"), start("colours")]
    until(lambda: begun() == ["begin sums", "begin colours"])
    until(lambda: is_awaited("adapter sums", scratch=tmp_path / ".scratch"))
    (tmp_path / "go").touch()
    told = [process.communicate()[1] for process in processes]

    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [line for line in begun() if "sums" in line] == ["begin sums", "end sums"] * 2
    waiting = f"adapter sums: process {processes[0].pid} is at it; waiting\n"
    assert told == ["", waiting, ""]


# A pipeline that starts a stage and dies under it.
PIPELINE = """
import os, subprocess, sys, time
with open("orphan", "w") as lines:
    subprocess.Popen([sys.executable, "adapter.py", "sums"], stderr=lines)
while not os.path.exists("die"):
    time.sleep(0.01)
os._exit(1)
"""


def test_a_stage_whose_pipeline_died_while_it_waited_is_not_run(tmp_path: Path, root: Path) -> None:
    (tmp_path / "adapter.py").write_text(SLOW)
    places: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(root)}}
    first = subprocess.Popen([sys.executable, "adapter.py", "sums"], **places)
    until((tmp_path / "log").exists)
    pipeline = subprocess.Popen([sys.executable, "-c", PIPELINE], **places)
    until(lambda: is_awaited("adapter sums", scratch=tmp_path / ".scratch"))
    (tmp_path / "die").touch()
    pipeline.wait()
    (tmp_path / "go").touch()
    first.wait()
    orphan = tmp_path / "orphan"
    until(lambda: "error" in orphan.read_text())
    lines = orphan.read_text()
    assert "adapter sums: the pipeline that started it has ended; not run" in lines
    assert (tmp_path / "log").read_text().splitlines() == ["begin sums", "end sums"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting is not allowed")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def tiny_adapter(rank: int) -> TrainedAdapter:
    training = AdapterTraining(
        task="sums",
        base_fingerprint="f" * 64,
        data_sha256="0" * 64,
        num_examples=1,
        num_parameters=1,
        longest_answer_tokens=1,
        kernels=(),
        curve=Curve((), 0),
        is_imported=False,
    )
    config = LoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return TrainedAdapter(get_peft_model(tiny_model(), config), "tiny", training)


def put_folder(out: Path, size: int) -> None:
    with written_folder(out) as aside:
        write_json(aside / "small.json", size)
        (aside / "large").write_bytes(bytes(1024 * size))


def put_table(out: Path, size: int) -> None:
    rows = [{"text": os.urandom(1024)} for _ in range(size)]
    write_table(out, rows, pa.schema([("text", pa.binary())]))
    assert len(read_table(out)) == size


def put_adapter(out: Path, size: int) -> None:
    tiny_adapter(rank=4 * size).save(out)  # a KiB and more for each


@pytest.mark.parametrize("put", [put_folder, put_table, put_adapter])
def test_a_disk_that_fills_up_is_one_line_and_leaves_the_old_output_as_it_was(
    run_stage: RunStage, small_disk: Path, put: Callable[[Path, int], None]
) -> None:
    out = small_disk / "data" / "out"

    def main(size: int) -> None:
        put(out, size)

    def tree() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in small_disk.rglob("*") if path.is_file()}

    assert run_stage(main, "20") == (0, "")
    before = tree()
    assert before

    code, told = run_stage(main, "1500")

    assert code == 1
    assert told.startswith("error: no space left on the disk: ")
    assert told.count("\n") == 1
    assert tree() == before
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert run_stage(main, "10") == (0, "")  # with room again, a run is a run
    assert tree() != before


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_progress_is_plain_lines_where_no_terminal_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv(name, "1")
    with progress("adapter sums", total=2) as advance:
        advance(2, loss=0.25)
    assert capsys.readouterr().err == "adapter sums: 2/2, 0 s left loss 0.25\n"
