"""Kill the pipeline again and again at random moments; the results must be those of a quiet run.

    python benchmarks/kills.py [--suite smoke] [--kills 20] [--seed 0] [--keep FOLDER]

Two clones of the committed state are made. In one the suite runs undisturbed. In the other it is
started, hit by SIGKILL after a random time and started again, as often as asked, then left to end;
if it ends before, it begins anew with nothing but its downloads. A blow hits DVC and its stage
together, the stage alone, or DVC alone, whose stage then goes on as an orphan. At the end every
output but timings and the report must have the same bytes.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from benchmarks.devices import add_device, chosen_place

ROOT = Path(__file__).resolve().parent.parent
VICTIMS = ("all", "stage", "dvc")
REPRO = [sys.executable, "-m", "dlplora.cli", "repro"]


def clone(folder: Path, suite: str) -> Path:
    """Clone the committed state, switched to a suite, with the downloads that are here."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    (folder / ".scratch").mkdir()
    if (ROOT / ".scratch/downloads").is_dir():
        (folder / ".scratch/downloads").symlink_to(ROOT / ".scratch/downloads")
    words = [sys.executable, "-m", "dlplora.cli", "use-suite", suite]
    subprocess.run(words, cwd=folder, check=True)
    (folder / "dvc.lock").unlink(missing_ok=True)  # it may tell of another suite's outputs
    return folder


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the pipeline in a session of its own; its lines go to a log beside the clone."""
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            REPRO,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"DVC_NO_ANALYTICS": "1"},
        )


def kill(running: subprocess.Popen[bytes], victim: str) -> list[str]:
    """Kill DVC, its stage or both; return the names of the stages that were running."""
    dvc = psutil.Process(running.pid)
    below = dvc.children(recursive=True)
    words = {process: process.cmdline() for process in below}
    stages = [process for process in below if any("tasks." in word for word in words[process])]
    hit = {"all": [dvc, *below], "stage": stages or [dvc], "dvc": [dvc]}[victim]
    for process in hit:
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    running.wait()
    return [" ".join(words[process][2:4]) for process in stages if "-m" in words[process]]


def outputs(folder: Path) -> dict[str, str]:
    """Return the hash of every output but timings and the report."""
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {
        out["path"]: out["md5"]
        for stage in stages.values()
        for out in stage["outs"]
        if not out["path"].startswith(("data/timings", "data/report"))
    }


def leftovers(folder: Path) -> list[str]:
    """Return what a killed run left aside in data/ and nobody cleaned up."""
    return [str(path.relative_to(folder)) for path in (folder / "data").rglob(".*.aside")]


def main() -> int:
    """Run both clones and compare them; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="smoke")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=60.0, help="seconds before a blow")
    parser.add_argument("--keep", type=Path, help="make the clones here and keep them")
    add_device(parser)
    options = parser.parse_args()
    chosen_place(options.device)  # the processes that it starts have no choice then
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        quiet = clone(folder / "quiet", options.suite)
        began = time.monotonic()
        if start(quiet).wait() != 0:
            print(f"the undisturbed run failed: {quiet.with_suffix('.log')}", file=sys.stderr)
            return 1
        undisturbed = time.monotonic() - began
        print(f"undisturbed: {undisturbed:.0f} s", flush=True)

        shaken = clone(folder / "shaken", options.suite)
        began = time.monotonic()
        blows: list[str] = []
        while len(blows) < options.kills:
            running = start(shaken)
            victim, seconds = rng.choice(VICTIMS), rng.uniform(1.0, options.longest)
            try:
                code = running.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                at = kill(running, victim)
                blows.append(victim)
                print(f"{len(blows)}: {victim} after {seconds:.1f} s, at {at}", flush=True)
                continue
            print(f"the run ended with exit code {code} before blow {len(blows) + 1}", flush=True)
            if code:
                return 1
            subprocess.run(["git", "clean", "-qfdx", "data"], cwd=shaken, check=True)
            (shaken / "dvc.lock").unlink()
            for cached in ("cache", "tmp"):
                shutil.rmtree(shaken / ".dvc" / cached)
        code = start(shaken).wait()
        shaken_seconds = time.monotonic() - began
        before, after = outputs(quiet), outputs(shaken)
        differing = sorted(path for path in before if before[path] != after.get(path))
        result = {
            "suite": options.suite,
            "kills": len(blows),
            "by_victim": {name: blows.count(name) for name in VICTIMS},
            "exit_code": code,
            "outputs": len(before),
            "differing": differing,
            "leftovers": leftovers(shaken),
            "undisturbed_seconds": round(undisturbed),
            "shaken_seconds": round(shaken_seconds),
        }
    print(json.dumps(result, indent=2))
    return int(bool(code or differing or set(before) ^ set(after) or result["leftovers"]))


if __name__ == "__main__":
    raise SystemExit(main())
