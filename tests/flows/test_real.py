"""A real training under the flow: cancelled, taken up again, and the same bytes at the end."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from prefect.settings import get_current_settings

from tests.tasks.test_pipeline import CODE, ROOT, Checkout, params
from tests.tiny import choices, opposites, write_raw, write_tiny_folder
from tests.waiting import until


@pytest.fixture
def project(tmp_path: Path) -> Checkout:
    root = tmp_path / "project"
    root.mkdir()
    for name in [*CODE, "flows"]:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, root / name)
    sha256 = write_tiny_folder(tmp_path / "tiny_base")
    write_raw(root / "suites/opposites.json", opposites(70))
    write_raw(root / "suites/colours.json", choices(70))
    write_raw(root / "suites/letters.json", opposites(70, start=900))
    values = params(sha256, tmp_path / "tiny_base")
    values["adapters"]["opposites"]["steps"] = 800  # more than a checkpoint's 5 seconds
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    checkout = Checkout(root)
    checkout.run("git", "init", "-q")
    checkout.run("dvc", "init", "-q")
    checkout.run("git", "add", "-A")
    checkout.run("git", "commit", "-qm", "Begin")
    return checkout


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
