"""A real training under the flow: cancelled, taken up again, and the same bytes at the end."""

import re
import signal
import subprocess
import sys

import psutil
from prefect.settings import get_current_settings

from tests.project import Checkout
from tests.waiting import until


def start(project: Checkout, log: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flows.pipeline", "adapter@opposites"]
    api = str(get_current_settings().api.url)
    with (project.root.parent / log).open("wb") as file:
        return subprocess.Popen(
            ["env", "PATH=/usr/bin:/bin", f"PREFECT_API_URL={api}", *command],
            cwd=project.root,
            stdout=file,
            stderr=file,
        )


def test_a_cancelled_training_goes_on_and_ends_with_the_same_bytes(project: Checkout) -> None:
    more = {"steps": 800}  # more than a checkpoint's 5 seconds
    project.edit(lambda values: values["adapters"]["opposites"].update(more))
    running = start(project, "first.log")
    checkpoints = project.root / ".scratch/checkpoints/adapter-opposites"
    until(lambda: bool(list(checkpoints.glob("*/state.json"))) or running.poll() is not None)
    below = psutil.Process(running.pid).children(recursive=True)
    assert any("tasks.adapter" in process.cmdline() for process in below)
    running.send_signal(signal.SIGINT)
    assert running.wait() != 0
    _, alive = psutil.wait_procs(below, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert start(project, "again.log").wait() == 0, project.lines("again.log")
    lines = project.lines("again.log")
    assert re.search(r"adapter opposites: going on after step [1-9]", lines)
    assert "3 up to date, 1 ran" in lines
    interrupted = project.hashes()
    project.run("dvc", "repro", "--force", "--single-item", "adapter@opposites")
    assert project.hashes() == interrupted
