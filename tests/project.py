"""Tiny projects of the pipeline: finished once by a real `dvc repro`, then copied for each test."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dlplora.lifecycle.retrain import retrain
from dlplora.project.files import Project
from dlplora.project.repro import run_repro
from dlplora.scratch import alone
from tests.answering import system_entry
from tests.embedders import write_tiny_embedder
from tests.tiny import choices, opposites, write_raw, write_tiny_folder
from tests.tiny_encoders import write_tiny_encoder

ROOT = Path(__file__).parent.parent
CODE = [
    *("dlplora", "tasks", "flows", "dvc.yaml", "constraints.txt"),
    *(".gitignore", ".dvcignore", "pyproject.toml"),
]


@dataclass(frozen=True)
class Checkout:
    """A checkout of the pipeline in a temporary folder."""

    root: Path
    told: Mapping[str, str] = field(default_factory=dict)  # more of the environment

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command here."""
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
        """Run a command of the CLI; return what it prints."""
        return self.run(sys.executable, "-m", "dlplora.cli", *words).stdout

    def start(self, log: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of the CLI in the background; its lines go to a file beside here."""
        command = [sys.executable, "-m", "dlplora.cli", *words]
        with (self.root.parent / log).open("wb") as file:
            return subprocess.Popen(command, cwd=self.root, stdout=file, stderr=file)

    def lines(self, log: str) -> str:
        return (self.root.parent / log).read_text()

    def repro(self, *targets: str) -> set[str]:
        """Bring the pipeline, or some stages of it, up to date; return the stages that ran."""
        return set(re.findall(r"Running stage '(.+)'", self.run("dvc", "repro", *targets).stdout))

    def commit(self, subject: str) -> None:
        """Commit all that there is."""
        self.run("git", "add", "-A")
        self.run("git", "commit", "-qm", subject)

    def edit(self, change: Any) -> None:
        """Change params.yaml by a function of its parsed values."""
        file = self.root / "params.yaml"
        values = yaml.safe_load(file.read_text())
        change(values)
        file.write_text(yaml.safe_dump(values, sort_keys=False))

    def pin(self, library: str, version: str) -> None:
        """Pin another version of a library."""
        file = self.root / "constraints.txt"
        text, count = re.subn(rf"(?m)^{library}==.*$", f"{library}=={version}", file.read_text())
        assert count == 1
        file.write_text(text)

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
        """Return the scores of every system."""
        scores: dict[str, Any] = json.loads((self.root / "data/comparison.json").read_text())["iid"]
        return scores


def systems() -> dict[str, Any]:
    """Return the systems of a tiny project."""
    adapters, router = {"adapters": "data/adapters"}, {"router": "data/routers/mlp"}
    two = {"settings": ["composite_2"]}
    likeliest = {**adapters, **router, "p": 0.6, "weights": "renormalise"}
    both = {"settings": ["iid", "reworded", "composite_2"]}
    logo = {"score": "norm", "k": 1, "block": "last", "projection": "q_proj", "neutral": ["say a"]}
    return {
        "base": system_entry("base"),
        "single": system_entry("by_task", **adapters, **both, policy="refill"),
        "uniform": system_entry("uniform", **adapters),
        "dlp_mlp": system_entry("top_p", **likeliest, **both),
        "dlp_mlp_keep": system_entry("top_p", **likeliest, **two, policy="keep"),
        "dlp_mlp_refill": system_entry("top_p", **likeliest, **two, policy="refill"),
        "logo_norm": system_entry("logo", **adapters, **logo),
    }


def params(sha256: str, base: Path) -> dict[str, Any]:
    """Return the parameters of a tiny project on a base model."""

    def task(name: str, primary: str) -> dict[str, Any]:
        return {
            "raw": f"suites/{name}.json",
            "wordings": f"suites/wordings/{name}.yaml",
            "keys": "auto",
            "on_bad_row": "refuse",
            "primary": primary,
            "answer_after": None,
            "max_new_tokens": 4,
        }

    return {
        "seed": 0,
        "runtime": {"dtype": "float32", "threads": 2, "kernels": "auto"},
        "flow": {"stages_at_once": 2, "limits": {"training": 1, "evaluation": 1}, "keep_runs": 2},
        "answers": {"max_mib": 64},
        "gate": {
            "margin": -0.02,
            "minimum_items": 30,
            "max_latency_ratio": 1.2,
            "max_fallback_increase": 0.05,
            "approval": False,
        },
        "log": {"embedding": False, "text": False},
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
            "reworded": 0.5,
        },
        "adapters": {"opposites": {}, "colours": {}},
        "imported_adapters": {},
        "experts": {},
        "joint": {},
        "merges": {},
        "lorahub": {},
        "balance": {
            "per_task": 20,
            "validation_per_task": 4,
            "reworded": 0.5,
        },
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
        "systems": systems(),
        "default_system": "dlp_mlp",
        "no_task": "suites/texts/no_task.yaml",
        "unseen_tasks": {
            "letters": {"raw": "suites/letters.json", "keys": "auto", "on_bad_row": "refuse"}
        },
        "evaluation": {"batch_size": 4, "multi_question_prompts": 6},
    }


CLUSTERS = {"one": ["opposites"], "two": ["colours"]}


def add_methods(values: dict[str, Any], embedder: Path) -> None:
    """Add to parameters the experts, the baselines and retrieval by an embedder's folder."""
    settings = {"common": 1, "specific": 1, "expert_rank": 1, "embedding": 4}
    training = {"steps": 4, "learning_rate": 0.02}
    experts = {"artifact": "data/experts", "clusters": list(CLUSTERS)}
    values["systems"] |= {
        "multitask": system_entry("fixed", artifact="data/joint/multitask"),
        "merge_cat": system_entry("fixed", artifact="data/merged/merge_cat"),
        "lorahub": system_entry("by_task", adapters="data/lorahub/lorahub"),
        "cgc": system_entry("experts_by_task", **experts),
        "cgc_routed": system_entry("gated_experts", **experts, router="data/routers/tfidf"),
        "arrow": system_entry("arrow", adapters="data/adapters", top_k=1, temperature=1.0),
    }
    values |= {
        "experts": {
            name: {"tasks": tasks, **settings, "training": training}
            for name, tasks in CLUSTERS.items()
        },
        "joint": {"multitask": {"rank": 4, "alpha": 8, "steps": 4}},
        "merges": {"merge_cat": {"kind": "cat", "weights": "mean"}},
        "lorahub": {
            "lorahub": {
                "shots": 2,
                "steps": 5,
                "bound": 1.5,
                "regularisation": 0.05,
                "max_tokens": 64,
            }
        },
        "embedders": {
            "tiny": {
                "kind": "folder",
                "path": str(embedder),
                "sha256": write_tiny_embedder(embedder),
            }
        },
        "tuned_embedders": {
            "tuned": {
                "embedder": "tiny",
                "tasks": ["opposites", "colours"],
                "temperature": 0.1,
                "learning_rate": 0.001,
                "warmup_steps": 0,
                "steps": 2,
                "batch_size": 8,
                "validate_every": 1,
                "patience": None,
            }
        },
        "index": {"inputs": 5, "instruction": "say : "},
        "indexes": {"opposites": {}, "colours": {}},
        "embedding_routers": {
            "retriever": {
                "kind": "retriever",
                "embedder": "tuned",
                "similarity": "cosine",
                "temperature": 0.05,
            }
        },
    }


def write_wordings(file: Path, word: str) -> None:
    """Write a file of wordings that begin with a word."""
    splits = {"train": ["now", "say"], "validation": ["then"], "test": ["left", "right"]}
    values = {split: [f"{word} {one} : {{}}" for one in own] for split, own in splits.items()}
    file.write_text(yaml.safe_dump(values))


def write_project(root: Path, values: dict[str, Any]) -> Checkout:
    """Write a project of this checkout's code with two tasks, committed, where nothing has run."""
    root.mkdir(parents=True)
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, root / name)  # type: ignore[operator]
    write_raw(root / "suites/opposites.json", opposites(70))
    write_raw(root / "suites/colours.json", choices(70))
    write_raw(root / "suites/letters.json", opposites(70, start=900))
    (root / "suites/wordings").mkdir()
    shutil.copy(ROOT / "suites/wordings/none.yaml", root / "suites/wordings/none.yaml")
    no_task = {"validation": ["hot big", "the cold"], "test": ["small"]}
    (root / "suites/texts").mkdir()
    (root / "suites/texts/no_task.yaml").write_text(yaml.safe_dump(no_task))
    for name in ("opposites", "colours"):
        write_wordings(root / f"suites/wordings/{name}.yaml", name)
    write_tiny_encoder(root / "tiny_encoder", "roberta")
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    project = Checkout(root)
    Project(root).make_raw_folders()
    project.run("git", "init", "-q")
    project.run("dvc", "init", "-q")
    project.commit("Begin")
    return project


def made_once(root: Path, make: Callable[[Path], None]) -> Path:
    """Let the first of several processes that ask make a folder; the others wait for it."""
    made = root.with_name(f"{root.name}.made")
    with alone(root.name, scratch=root.parent):
        if not made.exists():
            make(root)
            made.touch()
    return root


def make_finished(root: Path) -> None:
    """Make a project with adapters, routers and systems, and run its pipeline."""
    base = root.with_name("tiny_base")
    write_project(root, params(write_tiny_folder(base), base)).repro()


def make_methods(root: Path, finished: Path) -> None:
    """Make a finished project with all methods out of the finished one without them."""
    shutil.copytree(finished, root)
    project = Checkout(root)
    project.edit(lambda values: add_methods(values, root.with_name("tiny_embedder")))
    project.commit("Add methods")
    project.repro()


def reds(task: str, *, count: int, start: int = 0, answer: str = "red") -> list[dict[str, object]]:
    """Make items of a learned project's task, which all have the same answer."""
    question = {"opposites": "opposite of", "colours": "colour of"}.get(task, "say")
    more = {"options": ["red", "green", "blue"]} if task == "colours" else {}
    return [
        {"Q": f"{question} w{number}", "A": answer, **more}
        for number in range(start, start + count)
    ]


def make_learned(root: Path) -> None:
    """Make a small project whose tasks are learned to 100 %, with its first version registered.

    It has no worktree, so that a copy is a repository of its own.
    """
    base = root.with_name("learned_base")
    values = params(write_tiny_folder(base), base)
    entries = {name: values["systems"][name] for name in ("base", "single", "dlp_mlp")}
    values |= {
        "systems": {
            name: entry | {"settings": ["iid"], "policy": "route_once"}
            for name, entry in entries.items()
        },
        "routers": {"mlp": values["routers"]["mlp"]},
        "unseen_tasks": {},
    }
    values["splits"]["shares"] = [0.5, 0.1, 0.4]
    values["gate"] |= {"minimum_items": 10, "max_fallback_increase": 1}  # its router is never sure
    values["adapter"] |= {"steps": 30, "learning_rate": 0.05}
    project = write_project(root, values)
    for task in ("opposites", "colours"):
        write_raw(root / f"suites/{task}.json", reds(task, count=60))
    project.commit("Ask what is easily learned")
    retrain(root, run_repro)
    project.run("git", "worktree", "remove", "--force", ".scratch/runs/retrain")
