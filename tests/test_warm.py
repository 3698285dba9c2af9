"""Stages forked from a server beside the same run by themselves."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from dlplora import warm
from tests.waiting import until as wait_until

pytestmark = pytest.mark.skipif(not warm._can_serve(), reason="no server can be here")
SECONDS = 120
until = partial(wait_until, within=SECONDS)
HOOK = "from dlplora.warm import hand_over\nhand_over()\n"
TELLS = """
import json, os, sys
told = {
    "words": sys.argv[1:], "name": os.path.basename(sys.argv[0]), "cwd": os.getcwd(),
    "said": os.environ.get("SAID"), "read": sys.stdin.read(),
    "own": sorted(name for name in sys.modules if name.startswith("dlplora.")),
}
print(json.dumps(told), flush=True)
print("torch" in sys.modules, file=sys.stderr)
sys.exit(3)
"""
WAITS = """
import os, time
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "work").mkdir()
    for name, text in {"__init__": HOOK, "tells": TELLS, "waits": WAITS}.items():
        (folder / f"work/{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def told(root: Path) -> Iterator[dict[str, str]]:
    """The environment of stages while a server is there."""
    with warm.server_for(root) as more:
        (folder,) = more.values()
        until(lambda: Path(warm.socket_in(Path(folder))).exists())
        yield os.environ | more
    assert not Path(folder).exists()


def run(root: Path, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=root,
        env=environment | {"SAID": "hello"},
        input="a line",
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def test_a_forked_stage_is_told_and_tells_what_one_by_itself_does(
    root: Path, told: dict[str, str]
) -> None:
    alone = run(root, dict(os.environ), "work.tells", "one", "--two")
    forked = run(root, told, "work.tells", "one", "--two")
    assert forked.returncode == alone.returncode == 3
    found, expected = json.loads(forked.stdout), json.loads(alone.stdout)
    own = {name for name in found.pop("own") if not name.startswith("dlplora.warm")}
    assert own == set()  # code of ours is read when a stage starts
    del expected["own"]
    assert found == expected
    assert found["words"] == ["one", "--two"]
    assert found["name"] == "tells.py"
    assert (alone.stderr, forked.stderr) == ("False\n", "True\n")


def test_a_stage_runs_the_code_that_is_there_when_it_starts(
    root: Path, told: dict[str, str]
) -> None:
    file = root / "work/changes.py"
    for word in ("before", "after it was changed"):
        file.write_text(f"print({word!r})\n")
        assert run(root, told, "work.changes").stdout == f"{word}\n"


def test_an_error_of_a_forked_stage_ends_it_like_any_other(
    root: Path, told: dict[str, str]
) -> None:
    (root / "work/fails.py").write_text("raise ValueError('so it is')\n")
    done = run(root, told, "work.fails")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: so it is\n")


def test_a_forked_stage_may_say_how_its_streams_write(root: Path, told: dict[str, str]) -> None:
    (root / "work/writes.py").write_text(
        "import sys\n"
        "for stream in (sys.stdout, sys.stderr):\n"
        "    stream.reconfigure(errors='backslashreplace')\n"
        "    print(chr(0xdcff), file=stream)\n"
    )
    done = run(root, told, "work.writes")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\udcff\n", "\\udcff\n")


def waiting(root: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[str], int]:
    """Start a stage that sleeps; return what waits for it, and the stage."""
    started = subprocess.Popen(
        [sys.executable, "-m", "work.waits"],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    stage = int(started.stdout.readline())
    assert stage != started.pid
    return started, stage


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=str)
def test_a_signal_ends_both(root: Path, told: dict[str, str], number: signal.Signals) -> None:
    started, stage = waiting(root, told)
    with started:
        started.send_signal(number)
        assert started.wait(SECONDS) == -number
    until(lambda: not psutil.pid_exists(stage))


def test_a_stage_that_is_killed_ends_what_waits_for_it_alike(
    root: Path, told: dict[str, str]
) -> None:
    started, stage = waiting(root, told)
    with started:
        os.kill(stage, signal.SIGKILL)
        assert started.wait(SECONDS) == -signal.SIGKILL


def test_two_stages_run_at_once(root: Path, told: dict[str, str]) -> None:
    one, other = waiting(root, told), waiting(root, told)
    assert one[1] != other[1]
    for started, _ in (one, other):
        with started:
            started.terminate()


def test_a_stage_of_another_folder_or_without_a_server_runs_by_itself(
    root: Path, told: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "work").symlink_to(root / "work")
    assert run(tmp_path, told, "work.tells").stderr == "False\n"
    (name,) = told.keys() - os.environ.keys()
    gone = told | {name: str(tmp_path / "gone")}
    assert run(root, gone, "work.tells").stderr == "False\n"


def test_a_server_ends_with_the_process_that_started_it(root: Path) -> None:
    script = (
        "from pathlib import Path\nfrom dlplora import warm\nimport os\n"
        "with warm.server_for(Path()) as more:\n"
        "    print(*more.values(), flush=True)\n    os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.strip())
    assert folder.stat().st_mode & 0o777 == 0o700
    until(lambda: not folder.exists())
