"""Real `dvc repro` on a tiny model: what is rerun after each kind of change, and what is not."""

import json
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dlplora.scratch import alone, is_awaited
from tests.project import ROOT, Checkout, systems
from tests.tiny import opposites, write_raw
from tests.tiny_encoders import write_tiny_encoder

ROUTING = {"router_data", "router@mlp", "router@tfidf", "router@encoder"}
SYSTEMS = {f"evaluate@{name}" for name in systems()} | {"novelty@letters"}
END = {"compare", "model", "report"}


def stages_of(task: str) -> set[str]:
    return {f"ingest@{task}", f"adapter@{task}"}


def test_the_first_run_ends_with_a_comparison_and_a_report(finished: Path) -> None:
    scores = Checkout(finished).scores()
    assert set(scores) == {"base", "single", "uniform", "dlp_mlp", "logo_norm"}
    assert scores["single"]["normalised"] == 1
    assert scores["uniform"]["routing_accuracy"] is None
    report = finished / "data/report"
    assert (report / "index.html").exists()
    assert "Several questions in one prompt" in (report / "report.md").read_text()
    assert "AUROC" in (report / "report.md").read_text()
    compared = json.loads((finished / "data/comparison.json").read_text())
    assert set(compared["reworded"]) == {"single", "dlp_mlp"}
    assert "Other wordings" in (report / "report.md").read_text()
    assert set(compared["composite_2"]) == {"single", "dlp_mlp", "dlp_mlp_keep", "dlp_mlp_refill"}
    metrics = json.loads((finished / "data/metrics.json").read_text())
    assert metrics == {
        setting: {name: row["score"] for name, row in rows.items()}
        for setting, rows in compared.items()
    }


def test_a_second_run_does_nothing_and_leaves_git_clean(project: Checkout) -> None:
    project.commit("Run")
    assert project.repro() == set()
    assert project.run("git", "status", "--porcelain").stdout == ""
    assert not list((project.root / "data").rglob(".gitignore"))


def test_p_reruns_that_system_and_a_revert_restores_it(project: Checkout) -> None:
    before = project.hashes()
    project.edit(lambda values: values["systems"]["dlp_mlp"].update(p=0.9))
    assert project.repro() == {"evaluate@dlp_mlp", *END}
    project.edit(lambda values: values["systems"]["dlp_mlp"].update(p=0.6))
    assert project.repro() == set()
    assert project.hashes() == before


def test_code_reruns_the_stages_that_import_it_unless_it_does_the_same(project: Checkout) -> None:
    before = project.hashes()
    file = project.root / "dlplora/report/tables.py"
    source = file.read_text()
    file.write_text(f"{source}\n\n# no more\n")
    assert project.repro() == {"code"}
    assert project.hashes() == before
    file.write_text(f"{source}\n_NO_MORE = True\n")
    assert project.repro() == {"code", "report"}


def test_an_encoder_that_changes_reruns_the_router_that_reads_it(project: Checkout) -> None:
    before = project.hashes()
    write_tiny_encoder(project.root / "tiny_encoder", "roberta", seed=1)
    assert project.repro() == {"router@encoder", "novelty@letters", *END}
    changed = {path for path, md5 in project.hashes().items() if md5 != before[path]}
    assert "data/routers/encoder" in changed


def test_an_added_task_runs_its_stages_routers_and_systems_and_leaves_no_trace_when_removed(
    project: Checkout,
) -> None:
    before = project.hashes()
    write_raw(project.root.parent / "sums.json", opposites(90, start=300))
    project.cli("add-task", "sums", str(project.root.parent / "sums.json"))
    assert project.repro() == stages_of("sums") | ROUTING | SYSTEMS | END
    assert "sums" in (project.root / "data/report/report.md").read_text()
    untouched = {path: md5 for path, md5 in before.items() if "adapters" in path}
    assert untouched.items() <= project.hashes().items()

    project.cli("remove-task", "sums")
    assert project.repro() == set()  # all restored: this state was computed before
    assert before.items() <= project.hashes().items()
    left = [path for path in (project.root / "data").rglob("*sums*") if "raw" not in path.parts]
    assert left == []
    assert "sums" not in (project.root / "data/report/index.html").read_text()
    assert "sums" not in (project.root / "data/comparison/iid.json").read_text()


def test_an_imported_adapter_trains_nothing(project: Checkout) -> None:
    elsewhere = project.root.parent / "elsewhere"
    shutil.copytree(project.root / "data/adapters/opposites", elsewhere)
    file = project.root.parent / "more.json"
    write_raw(file, opposites(90, start=600))
    project.cli("add-task", "more", str(file), "--adapter", str(elsewhere))
    assert project.repro("import_adapter@more") == {"import_adapter@more"}
    assert "adapter@more" not in project.run("dvc", "stage", "list").stdout.split()
    weights = "adapter_model.safetensors"
    imported = project.root / "data/adapters/more" / weights
    assert imported.read_bytes() == (elsewhere / weights).read_bytes()


def test_a_fresh_clone_with_a_remote_trains_nothing(project: Checkout) -> None:
    remote = project.root.parent / "remote"
    project.run("dvc", "remote", "add", "-d", "storage", str(remote))
    project.commit("Add a remote")
    project.run("make", "-f", str(ROOT / "Makefile"), "push", f"VENV={sys.prefix}", "-o", "env")
    clone = Checkout(project.root.parent / "clone")
    project.run("git", "clone", "-q", str(project.root), str(clone.root))
    clone.run("make", "-f", str(ROOT / "Makefile"), "pull", f"VENV={sys.prefix}", "-o", "env")
    assert clone.repro() == set()
    assert clone.scores() == project.scores()
    assert (clone.root / "data/report/index.html").exists()


def test_a_bad_row_is_one_line_and_the_last_outputs_stay(project: Checkout) -> None:
    before = (project.root / "data/comparison.json").read_bytes()
    write_raw(project.root / "suites/opposites.json", [*opposites(70), {"Q": "what is up ?"}])
    done = project.run("dvc", "repro", check=False)
    assert done.returncode != 0
    wanted = "error: suites/opposites.json: item 71 has no answer (keys: Q)"
    assert wanted in done.stdout + done.stderr
    assert (project.root / "data/comparison.json").read_bytes() == before


def _stage_of(dvc: psutil.Process, words: str) -> psutil.Process:
    """Wait until a process that runs DVC has started a stage; return the stage's process."""
    for _ in range(600):
        for process in dvc.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if words in " ".join(process.cmdline()[1:]):
                    return process
        time.sleep(0.05)
    raise AssertionError(f"no {words}")


@pytest.mark.parametrize("victim", ["dvc and its stage", "dvc"])
def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(
    project: Checkout, victim: str
) -> None:
    more = {"steps": 800}  # more than a checkpoint's 5 seconds
    project.edit(lambda values: values["adapters"]["opposites"].update(more))
    running = project.start("first.log", "repro", "adapter@opposites")
    dvc = psutil.Process(running.pid)
    waiting = _stage_of(dvc, "tasks.adapter opposites")
    checkpoints = project.root / ".scratch/checkpoints/adapter-opposites"
    while waiting.is_running() and not list(checkpoints.glob("*/state.json")):
        time.sleep(0.02)
    lock = project.root / ".scratch/locks/adapter-opposites.lock"
    stage = psutil.Process(int(lock.read_text()))  # forked, or the one that DVC started
    stage.suspend()  # what is not killed goes on when the next run has met it
    dvc.kill()
    if victim != "dvc":
        stage.kill()
        with alone("adapter opposites", scratch=project.root / ".scratch"):
            pass  # a killed process may take seconds to end and let go of its lock
    running.wait()
    again = project.start("again.log", "repro", "adapter@opposites")
    if victim == "dvc":
        while not is_awaited("adapter opposites", scratch=project.root / ".scratch"):
            time.sleep(0.05)
        stage.resume()
    assert again.wait() == 0, project.lines("again.log")
    lines = project.lines("again.log")
    assert re.search(r"adapter opposites: going on after step [1-9]", lines)
    assert ("adapter opposites: process" in lines) == (victim == "dvc")
    assert not list(checkpoints.glob("*"))
    interrupted = project.hashes()
    project.run("dvc", "repro", "--force", "--single-item", "adapter@opposites")
    assert project.hashes() == interrupted


def test_a_second_repro_waits_for_the_first(project: Checkout) -> None:
    project.edit(lambda values: values["systems"]["dlp_mlp"].update(p=0.9))
    first = project.start("first.log", "repro")
    _stage_of(psutil.Process(first.pid), "tasks.")
    second = project.start("again.log", "repro")
    assert (second.wait(), first.wait()) == (0, 0), project.lines("first.log")
    lines = project.lines("again.log")
    assert f"repro: process {first.pid} is at it; waiting" in lines
    assert "Running stage" not in lines
