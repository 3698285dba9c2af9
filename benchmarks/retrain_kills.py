"""Kill retrains at random moments: nothing may be half promoted, and no file of the inbox lost.

    python -m benchmarks.retrain_kills [--kills 20] [--seed 0]

A tiny project of two tasks has one model in production. For each blow a file of new questions is
put into data/inbox, `python -m flows.retrain` is started and hit by SIGKILL after a random time –
the flow alone, whose stage goes on as an orphan, or all that it started as well. Then the model in
production has to be whole and the file has to be somewhere; the next retrain has to end well, with
the file taken in. In the end the model must have the same bytes as that of a project which got all
files at once, undisturbed. Written to benchmarks/results/retrain_kills.json.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.devices import add_device, chosen_place
from benchmarks.record import write_results
from dlplora.data.checksums import data_folder_sha256
from dlplora.lifecycle.registry import Registry
from dlplora.params.project import Runtime
from dlplora.records.files import file_sha256, read_json, write_json
from dlplora.runtime import set_up

MARK = "RETRAIN_KILLS"  # in the environment of all that is started here
RETRAIN = [sys.executable, "-m", "flows.retrain"]


def make(project: Path) -> Path:
    """Make the tests' project of tasks that are learned by heart, its first model registered."""
    project.parent.mkdir(parents=True)
    code = "import pathlib, sys, tests.project as p; p.make_learned(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(project)], check=True)
    return project


def drop(project: Path, number: int) -> Path:
    """Put new questions of one task into the inbox."""
    rows = [{"Q": f"opposite of w{number}x{place}", "A": "red"} for place in range(12)]
    file = project / "data/inbox/opposites.json"
    write_json(file, rows)
    return file


def start(project: Path) -> subprocess.Popen[bytes]:
    """Start a retrain in a session of its own; its lines go to a log beside the project."""
    with (project.parent / "retrain.log").open("ab") as log:
        return subprocess.Popen(
            RETRAIN,
            cwd=project,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"DVC_NO_ANALYTICS": "1", MARK: str(os.getpid())},
        )


def end(project: Path) -> float:
    """Let a retrain end; return its seconds."""
    began = time.monotonic()
    code = start(project).wait()
    if code:
        raise SystemExit(f"a retrain ended with exit code {code}: see {project.parent}")
    return time.monotonic() - began


def marked() -> list[psutil.Process]:
    """List the living processes that were started from here, directly or not."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(os.getpid()):
                found.append(process)
    return found


def kill(running: subprocess.Popen[bytes], *, everything: bool) -> str:
    """Kill a retrain, and perhaps all that it started; return what was running below it."""
    words = []
    for process in marked():
        with suppress(psutil.Error):
            words += process.cmdline()
    running.kill()
    if everything:
        end_marked()
    running.wait()
    named = (name for name in ("judge", "repro", "status", "git") if name in words)
    return next(named, "the flow itself")


def end_marked() -> None:
    """Kill all that was started from here."""
    for process in marked():
        with suppress(psutil.Error):
            process.kill()


def check_whole(project: Path) -> str:
    """Check that what is in production is a registered model with all its files; return it."""
    current = project / ".models/current"
    version = os.readlink(current)
    card = read_json(current / "model.json")
    assert card["version"] == version
    known = {each.name: each for each in Registry(project).versions()}
    assert known[version].commit == card["commit"]
    for task in card["card"]["tasks"]:
        assert (current / "adapters" / task / "adapter_model.safetensors").is_file()
    assert (current / "base/base.json").is_file()
    assert (current / "params.yaml").is_file()
    return version


def count(project: Path, sha256: str) -> Counter[str]:
    """Count in which folders of the inbox a file's content stands."""
    inbox = project / "data/inbox"
    files = [path for path in inbox.rglob("*.json") if path.is_file()]
    found = [path for path in files if file_sha256(path) == sha256]
    return Counter(path.relative_to(inbox).parts[0] for path in found)


def main() -> None:
    """Kill, check, end, check; write what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    add_device(parser)
    options = parser.parse_args()
    chosen_place(options.device)  # the processes that it starts have no choice then
    draw = random.Random(options.seed)
    blows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="retrain_kills-") as place:
        project = make(Path(place) / "killed/project")
        drop(project, 0)
        whole_seconds = end(project)
        dropped = [0]
        number = 0
        while len(blows) < options.kills:
            number += 1
            file = drop(project, number)
            dropped.append(number)
            sha256, promoted = file_sha256(file), check_whole(project)
            running, seconds = start(project), draw.uniform(0, whole_seconds)
            with suppress(subprocess.TimeoutExpired):
                running.wait(seconds)
            is_late = running.poll() is not None  # it ended before
            everything = number % 2 == 0
            hit = None if is_late else kill(running, everything=everything)
            after, where = check_whole(project), count(project, sha256)
            assert sum(where.values()) == 1, where
            recovery = end(project)
            end_marked()  # a server that lost its flow
            assert check_whole(project) != promoted, "the file's model was not promoted"
            assert count(project, sha256) == {"taken": 1}
            if hit is not None:
                blows.append(
                    {
                        "after_seconds": round(seconds, 1),
                        "hit": hit,
                        "all_processes": everything,
                        "file_in": next(iter(where)),
                        "was_promoted": after != promoted,
                        "next_run_seconds": round(recovery, 1),
                    }
                )
                print(json.dumps(blows[-1]), flush=True)
        quiet = make(Path(place) / "quiet/project")
        for number in dropped:
            drop(quiet, number).rename(quiet / f"rows{number}.json")
        rows = [row for number in dropped for row in read_json(quiet / f"rows{number}.json")]
        write_json(quiet / "data/inbox/opposites.json", rows)
        end(quiet)
        models = [
            {
                folder: data_folder_sha256(each / ".models/current" / folder)
                for folder in ("adapters", "routers", "base")
            }
            for each in (project, quiet)
        ]
        assert models[0] == models[1], "other bytes than undisturbed"
    write_results(
        "retrain_kills",
        {"whole_seconds": round(whole_seconds, 1), "blows": blows},
        place=set_up(Runtime(dtype="float32", threads=2), seed=0),
        rounds=1,
        libraries=("dvc", "gto", "prefect", "torch"),
    )


if __name__ == "__main__":
    main()
