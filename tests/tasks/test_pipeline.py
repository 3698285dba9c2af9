"""Real `dvc repro` on a tiny model: what is rerun after each kind of change, and what is not.

One project serves all tests in the order in which they stand; each begins up to date.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dlplora import warm
from dlplora.data.splits import places_of
from dlplora.scratch import alone, is_awaited
from tests.tiny import choices, opposites, write_raw, write_tiny_folder
from tests.tiny_encoders import write_tiny_encoder

ROOT = Path(__file__).parent.parent.parent
CODE = ["dlplora", "tasks", "dvc.yaml", ".gitignore", ".dvcignore", "pyproject.toml"]
ROUTING = {"router_data", "router@mlp", "router@tfidf", "router@encoder"}
SYSTEMS = {f"evaluate@{name}" for name in ("uniform", "dlp_mlp", "logo_norm")}
SYSTEMS |= {"evaluate_composite@composite_2", "novelty@letters"}
END = {"compare", "report"}


@dataclass(frozen=True)
class Checkout:
    """A checkout of the pipeline in a temporary folder."""

    root: Path
    told: Mapping[str, str] = field(default_factory=dict)  # more of the environment

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GIT_AUTHOR_NAME": "test",
            "GIT_AUTHOR_EMAIL": "test@localhost",
            "GIT_COMMITTER_NAME": "test",
            "GIT_COMMITTER_EMAIL": "test@localhost",
            **self.told,
        }
        done = subprocess.run(
            words, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def cli(self, *words: str) -> str:
        return self.run(sys.executable, "-m", "dlplora.cli", *words).stdout

    def start(self, log: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of the CLI in the background; its lines go to a file beside here."""
        command = [sys.executable, "-m", "dlplora.cli", *words]
        with (self.root.parent / log).open("wb") as file:
            return subprocess.Popen(command, cwd=self.root, stdout=file, stderr=file)

    def lines(self, log: str) -> str:
        return (self.root.parent / log).read_text()

    def repro(self) -> set[str]:
        """Bring the pipeline up to date; return the stages that really ran."""
        return set(re.findall(r"Running stage '(.+)'", self.run("dvc", "repro").stdout))

    def edit(self, change: Any) -> None:
        """Change params.yaml by a function of its parsed values."""
        file = self.root / "params.yaml"
        values = yaml.safe_load(file.read_text())
        change(values)
        file.write_text(yaml.safe_dump(values, sort_keys=False))

    def hashes(self) -> dict[str, str]:
        """Return the hash of every output but timings and the report."""
        stages = yaml.safe_load((self.root / "dvc.lock").read_text())["stages"]
        return {
            out["path"]: out["md5"]
            for stage in stages.values()
            for out in stage["outs"]
            if not out["path"].startswith(("data/timings", "data/report"))
        }

    def scores(self) -> dict[str, Any]:
        scores: dict[str, Any] = json.loads((self.root / "data/comparison.json").read_text())["iid"]
        return scores


def params(sha256: str, base: Path) -> dict[str, Any]:
    def task(name: str, primary: str) -> dict[str, Any]:
        return {
            "raw": f"suites/{name}.json",
            "keys": "auto",
            "on_bad_row": "refuse",
            "primary": primary,
            "answer_after": None,
            "max_new_tokens": 4,
        }

    return {
        "seed": 0,
        "runtime": {"dtype": "float32", "threads": 2},
        "flow": {"stages_at_once": 2, "limits": {"training": 1, "evaluation": 1}, "keep_runs": 2},
        "base_model": {
            "kind": "folder",
            "path": str(base),
            "sha256": sha256,
            "system_prompt": "",
            "trust_remote_code": False,
        },
        "sources": {},
        "tasks": {
            "opposites": task("opposites", "exact_match"),
            "colours": task("colours", "accuracy"),
        },
        "splits": {
            "train": 40,
            "validation": 8,
            "test": 60,
            "shares": [0.7, 0.15, 0.15],
            "least": [8, 1, 1],
        },
        "adapter": {
            "target_modules": ["q_proj", "v_proj"],
            "rank": 2,
            "alpha": 4,
            "dropout": 0.0,
            "learning_rate": 0.01,
            "warmup_steps": 1,
            "steps": 3,
            "batch_size": 8,
            "micro_batch_size": "auto",
            "max_tokens": 64,
            "validate_every": 2,
            "patience": None,
            "share_prefix": "exact",
        },
        "adapters": {"opposites": {}, "colours": {}},
        "imported_adapters": {},
        "experts": {},
        "joint": {},
        "merges": {},
        "arrow": {},
        "lorahub": {},
        "balance": {"per_task": 20, "validation_per_task": 4, "composites": 4, "parts": [2]},
        "routers": {
            "mlp": {
                "kind": "mlp",
                "reads": "data/base",
                "parameters": 5000,
                "hidden": 16,
                "max_tokens": 32,
                "learning_rate": 0.01,
                "batch_size": 8,
                "epochs": 4,
                "patience": 2,
            },
            "tfidf": {"kind": "tfidf", "reads": "data/base", "regularisation": 10.0},
            "encoder": {
                "kind": "encoder",
                "reads": "tiny_encoder",
                "max_tokens": 24,
                "learning_rate": 0.01,
                "batch_size": 8,
                "epochs": 1,
                "patience": 1,
            },
        },
        "embedders": {},
        "tuned_embedders": {},
        "index": {"inputs": 20, "instruction": ""},
        "indexes": {},
        "embedding_routers": {},
        "systems": {
            "uniform": {"artifact": "data/adapters", "route": "uniform"},
            "dlp_mlp": {
                "artifact": "data/routers/mlp",
                "route": "top_p",
                "p": 0.6,
                "weights": "renormalise",
            },
            "logo_norm": {
                "artifact": "data/adapters",
                "route": "logo",
                "score": "norm",
                "k": 1,
                "block": "last",
                "projection": "q_proj",
                "neutral": ["say a"],
            },
        },
        "gated_systems": {},
        "unseen_tasks": {
            "letters": {"raw": "suites/letters.json", "keys": "auto", "on_bad_row": "refuse"}
        },
        "composites": {
            "composite_2": {
                "system": "dlp_mlp",
                "artifact": "data/routers/mlp",
                "parts": 2,
                "count": 6,
            }
        },
        "evaluation": {"batch_size": 4},
    }


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    folder = tmp_path_factory.mktemp("pipeline")
    root = folder / "project"
    root.mkdir()
    for name in CODE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, root / name)
    sha256 = write_tiny_folder(folder / "tiny_base")
    write_tiny_encoder(root / "tiny_encoder", "roberta")
    write_raw(root / "suites/opposites.json", opposites(70))
    write_raw(root / "suites/colours.json", choices(70))
    write_raw(root / "suites/letters.json", opposites(70, start=900))
    (root / "params.yaml").write_text(
        yaml.safe_dump(params(sha256, folder / "tiny_base"), sort_keys=False)
    )
    with warm.server_for(root) as told:
        checkout = Checkout(root, told)
        checkout.run("git", "init", "-q")
        checkout.run("dvc", "init", "-q")
        checkout.run("git", "add", "-A")
        checkout.run("git", "commit", "-qm", "Begin")
        checkout.repro()
        yield checkout


def stages_of(task: str) -> set[str]:
    names = ("ingest", "adapter", "evaluate_base", "evaluate_single")
    return {f"{name}@{task}" for name in names}


def place_share(question: str) -> float:
    """Return where between 0 and 1 a question stands, for the shares of the splits."""
    (place,) = places_of([question]).tolist()
    return float(place / 2**64)


def test_the_first_run_ends_with_a_comparison_and_a_report(project: Checkout) -> None:
    scores = project.scores()
    assert set(scores) == {"base", "single", "uniform", "dlp_mlp", "logo_norm"}
    assert scores["single"]["normalised"] == 1
    assert scores["uniform"]["routing_accuracy"] is None
    report = project.root / "data/report"
    assert (report / "index.html").exists()
    assert "Composite prompts" in (report / "report.md").read_text()
    assert "AUROC" in (report / "report.md").read_text()
    metrics = json.loads((project.root / "data/comparison.json").read_text())
    assert set(metrics["composite_2"]) == {"oracle", "route_once", "keep", "refill"}


def test_a_second_run_does_nothing_and_leaves_git_clean(project: Checkout) -> None:
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "Run")
    assert project.repro() == set()
    assert project.run("git", "status", "--porcelain").stdout == ""
    assert not list((project.root / "data").rglob(".gitignore"))


def test_a_forced_run_gives_the_same_bytes(project: Checkout) -> None:
    before = project.hashes()
    stages = ["adapter@opposites", "router_data", "router@mlp", "evaluate@dlp_mlp"]
    project.run("dvc", "repro", "--force", "--single-item", *stages)
    assert project.hashes() == before
    project.repro()


def test_p_reruns_that_system_and_a_revert_restores_it(project: Checkout) -> None:
    before = project.hashes()
    project.edit(lambda values: values["systems"]["dlp_mlp"].update(p=0.9))
    assert project.repro() == {"evaluate@dlp_mlp", "evaluate_composite@composite_2", *END}
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
    file.write_text(source)
    assert project.repro() == set()
    assert project.hashes() == before


def test_an_encoder_that_changes_reruns_the_router_that_reads_it(project: Checkout) -> None:
    before = project.hashes()
    write_tiny_encoder(project.root / "tiny_encoder", "roberta", seed=1)
    assert project.repro() == {"router@encoder", "novelty@letters", *END}
    changed = {path for path, md5 in project.hashes().items() if md5 != before[path]}
    assert "data/routers/encoder" in changed
    write_tiny_encoder(project.root / "tiny_encoder", "roberta")
    assert project.repro() == set()
    assert project.hashes() == before


def test_a_test_row_trains_nothing(project: Checkout) -> None:
    before = project.hashes()
    items = opposites(70)
    new = next(row for row in opposites(200, start=500) if place_share(str(row["Q"])) >= 0.85)
    write_raw(project.root / "suites/opposites.json", [*items, new])
    own = {f"{stage}@opposites" for stage in ("ingest", "evaluate_base", "evaluate_single")}
    assert project.repro() == own | SYSTEMS | END
    write_raw(project.root / "suites/opposites.json", items)
    assert project.repro() == set()
    assert project.hashes() == before


def test_a_train_row_trains_one_adapter_and_scores_no_base(project: Checkout) -> None:
    before = project.hashes()
    items = choices(70)
    places = sorted(place_share(str(row["Q"])) for row in items)
    new = next(row for row in choices(300, start=500) if place_share(str(row["Q"])) < places[30])
    write_raw(project.root / "suites/colours.json", [*items, new])
    own = {f"{stage}@colours" for stage in ("ingest", "adapter", "evaluate_single")}
    assert project.repro() == own | ROUTING | SYSTEMS | END
    write_raw(project.root / "suites/colours.json", items)
    assert project.repro() == set()
    assert project.hashes() == before


def test_an_added_task_runs_its_stages_routers_and_fusing_systems(project: Checkout) -> None:
    before = project.hashes()
    write_raw(project.root.parent / "sums.json", opposites(90, start=300))
    project.cli("add-task", "sums", str(project.root.parent / "sums.json"))
    assert project.repro() == stages_of("sums") | ROUTING | SYSTEMS | END
    assert "sums" in (project.root / "data/report/report.md").read_text()
    untouched = {path: md5 for path, md5 in before.items() if "adapters" in path}
    assert untouched.items() <= project.hashes().items()


def test_an_imported_adapter_trains_nothing(project: Checkout) -> None:
    elsewhere = project.root.parent / "elsewhere"
    shutil.copytree(project.root / "data/adapters/opposites", elsewhere)
    write_raw(project.root.parent / "more.json", opposites(90, start=600))
    project.cli(
        "add-task", "more", str(elsewhere.parent / "more.json"), "--adapter", str(elsewhere)
    )
    expected = {name.replace("adapter@", "import_adapter@") for name in stages_of("more")}
    assert project.repro() == expected | ROUTING | SYSTEMS | END
    weights = "adapter_model.safetensors"
    imported = project.root / "data/adapters/more" / weights
    assert imported.read_bytes() == (elsewhere / weights).read_bytes()
    project.cli("remove-task", "more")
    assert project.repro() == set()


def test_a_removed_task_leaves_no_trace_in_results(project: Checkout) -> None:
    project.cli("remove-task", "sums")
    assert project.repro() == set()  # all restored: this state was computed before
    left = [path for path in (project.root / "data").rglob("*sums*") if "raw" not in path.parts]
    assert left == []
    assert "sums" not in (project.root / "data/report/index.html").read_text()
    assert "sums" not in (project.root / "data/comparison/iid.json").read_text()


def test_a_fresh_clone_with_a_remote_trains_nothing(project: Checkout) -> None:
    remote = project.root.parent / "remote"
    project.run("dvc", "remote", "add", "-d", "storage", str(remote))
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "Add a remote")
    project.run("make", "-f", str(ROOT / "Makefile"), "push", f"VENV={sys.prefix}", "-o", "env")
    clone = Checkout(project.root.parent / "clone")
    project.run("git", "clone", "-q", str(project.root), str(clone.root))
    clone.run("make", "-f", str(ROOT / "Makefile"), "pull", f"VENV={sys.prefix}", "-o", "env")
    assert clone.repro() == set()
    assert clone.scores() == project.scores()
    assert (clone.root / "data/report/index.html").exists()


def test_a_bad_row_is_one_line_and_the_last_outputs_stay(project: Checkout) -> None:
    before = (project.root / "data/comparison.json").read_bytes()
    items = opposites(70)
    write_raw(project.root / "suites/opposites.json", [*items, {"Q": "what is up ?"}])
    done = project.run("dvc", "repro", check=False)
    assert done.returncode != 0
    wanted = "error: suites/opposites.json: item 71 has no answer (keys: Q)"
    assert wanted in done.stdout + done.stderr
    assert (project.root / "data/comparison.json").read_bytes() == before
    write_raw(project.root / "suites/opposites.json", items)
    assert project.repro() == set()


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
    steps = {"dvc and its stage": 800, "dvc": 801}[victim]  # more than a checkpoint's 5 seconds
    project.edit(lambda values: values["adapters"]["opposites"].update(steps=steps))
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
    project.edit(lambda values: values["adapters"].update(opposites={}))
    assert project.repro() == set()


def test_a_second_repro_waits_for_the_first(project: Checkout) -> None:
    project.edit(lambda values: values.update(seed=1))
    first = project.start("first.log", "repro")
    _stage_of(psutil.Process(first.pid), "tasks.")
    second = project.start("again.log", "repro")
    assert (second.wait(), first.wait()) == (0, 0), project.lines("first.log")
    lines = project.lines("again.log")
    assert f"repro: process {first.pid} is at it; waiting" in lines
    assert "Running stage" not in lines
    project.edit(lambda values: values.update(seed=0))
    assert project.repro() == set()
