"""What the flow adds to `dvc repro`: seconds of trivial stages, run anew and up to date.

    python -m benchmarks.flows [--stages 20] [--rounds 3]

A temporary project of independent stages that only write a file is brought up to date by `dvc
repro`, by the flow with a server of its own, and by the flow with one that is there already.
Written to benchmarks/results/flows.json: medians of wall-clock and CPU seconds. What a server that
is there already computes is not in the CPU seconds.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from benchmarks.record import write_results
from dlplora.params.project import Runtime
from dlplora.runtime import set_up

ROOT = Path(__file__).resolve().parent.parent
PORT = 14190
STAGE = (
    "  stage_{0}:\n    cmd: echo {0} > data/{0}.txt\n    deps: [stamp]\n    outs: [data/{0}.txt]\n"
)
DVC = [sys.executable, "-m", "dvc", "repro", "-q"]
FLOW = [sys.executable, "-m", "flows.pipeline"]


def project(folder: Path, stages: int) -> Path:
    """Make a project of stages that only write a file."""
    for package in ("flows", "dlplora"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    shutil.copytree(ROOT / "suites", folder / "suites")
    shutil.copyfile(ROOT / "params.yaml", folder / "params.yaml")
    (folder / "data").mkdir()
    (folder / ".gitignore").write_text("/data/\n/.scratch/\n/stamp\n")
    (folder / "dvc.yaml").write_text("stages:\n" + "".join(map(STAGE.format, range(stages))))
    for words in ("git init -q", f"{sys.executable} -m dvc init -q", "git add -A"):
        subprocess.run(words.split(), cwd=folder, check=True)
    who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    subprocess.run(["git", *who, "commit", "-qm", "Begin"], cwd=folder, check=True)
    return folder


def timed(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Run a command; return its wall-clock seconds, and the CPU seconds of all that it started."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start_server(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a Prefect server and wait until it answers."""
    Path(environment["PREFECT_HOME"]).mkdir(parents=True)
    words = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(PORT)]
    server = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while server.poll() is None:
        with (
            suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/health", timeout=5),
        ):
            break
        time.sleep(0.2)
    if server.poll() is not None:
        raise SystemExit("the Prefect server has ended before it answered")
    return server


def measure(folder: Path, *, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Time each way, with all stages to run and with none."""
    common = os.environ | {"DVC_NO_ANALYTICS": "1"}
    alone = common | {"PREFECT_HOME": str(folder / ".scratch/alone")}
    served = common | {
        "PREFECT_HOME": str(folder / ".scratch/served"),
        "PREFECT_API_URL": f"http://127.0.0.1:{PORT}/api",
    }
    ways = {
        "dvc repro": (DVC, alone),
        "flow, own server": (FLOW, alone),
        "flow, server there": (FLOW, served),
    }
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
    server = start_server(folder, served)
    try:
        for number in range(rounds):
            for name, (words, environment) in ways.items():
                (folder / "stamp").write_text(f"{number} {name}")
                for work in ("all to run", "nothing to do"):
                    seconds = timed(words, folder, environment)
                    taken.setdefault((work, name), []).append(seconds)
                    print(f"{work}, {name}: {seconds[0]:.1f} s, CPU {seconds[1]:.1f} s", flush=True)
    finally:
        server.terminate()
        server.wait()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (work, name), rows in taken.items():
        wall, cpu = (statistics.median(row[column] for row in rows) for column in (0, 1))
        row = {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}
        found.setdefault(work, {})[name] = row
    return found


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "project").mkdir()
        made = project(Path(folder) / "project", options.stages)
        found = measure(made, rounds=options.rounds)
    write_results(
        "flows",
        {"stages": options.stages, **found},
        place=set_up(Runtime(dtype="float32", threads=1), seed=0),
        rounds=options.rounds,
        libraries=("dvc", "prefect", "fastapi"),
    )


if __name__ == "__main__":
    main()
