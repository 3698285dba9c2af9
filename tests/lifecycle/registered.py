"""Small repositories of git and DVC whose stages write a base model and a model of a few bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dlplora.records.files import write_json
from dlplora.records.model_card import ModelCard, TaskData, VersionCard, version_card_of
from dlplora.records.verdict import Decision, Difference, Judgement, Verdict

_STAGES = {
    name: {
        "cmd": f"mkdir -p data && cp -R source/{name} data/{name}",
        "deps": [f"source/{name}"],
        "outs": [f"data/{name}"],
    }
    for name in ("base", "model")
}
_AUTHOR = ("-c", "user.name=test", "-c", "user.email=test@localhost")


def git(folder: Path, *words: str) -> str:
    """Run git as a user would."""
    done = subprocess.run(
        ["git", *_AUTHOR, *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def dvc(folder: Path, *words: str) -> None:
    """Run DVC by this interpreter."""
    told = os.environ | {"DVC_NO_ANALYTICS": "1"}
    subprocess.run(
        [sys.executable, "-m", "dvc", *words], cwd=folder, env=told, check=True, capture_output=True
    )


def judged(verdict: Verdict, *, against: str = "v0.0.1") -> Judgement:
    """Make a judgement that came to a verdict."""
    whole = Difference(verdict, 60, 0.5, 0.625, -0.125, -0.25, 0.0)
    task = Difference(verdict, 60, 0.5, 0.625, -0.125, -0.25, 0.0)
    items = {"colours": "5" * 64}
    return Judgement(against, "mlp", "mlp", whole, {"colours": task}, items, 0, 1.0, ("A note.",))


@dataclass(frozen=True)
class Repository:
    """A project in a repository, perhaps in a folder of it."""

    root: Path

    def commit_version(
        self,
        model: str,
        *,
        base: str = "base one",
        verdict: Judgement | None = None,
        decision: Decision = "promoted",
        score: float = 0.5,
    ) -> str:
        """Make a model and a base model of a text each, and commit them with their card."""
        for name, text in (("model", model), ("base", base)):
            folder = self.root / f"source/{name}/inner"
            folder.mkdir(parents=True, exist_ok=True)
            (folder.parent / "weights").write_text(text)
            (folder / "more").write_text(f"{name} more")
        return self.commit_made(verdict=verdict, decision=decision, score=score)

    def commit_made(
        self,
        *,
        verdict: Judgement | None = None,
        decision: Decision = "promoted",
        score: float = 0.5,
    ) -> str:
        """Let DVC make what stands in source/, and commit that with its card."""
        dvc(self.root, "repro", "-q")
        lock = yaml.safe_load((self.root / "dvc.lock").read_text())["stages"]
        md5s = {name: lock[name]["outs"][0]["md5"] for name in ("base", "model")}
        card = VersionCard(
            created="2031-05-06T07:08:09+00:00",
            suite="default",
            score=score,
            scores={"iid": {"mlp": score, "single": 0.75}},
            card=ModelCard("f" * 64, "mlp", {"colours": TaskData(1200, 8, 60, "a" * 64)}),
            inputs="1" * 64,
            base_md5=md5s["base"],
            model_md5=md5s["model"],
            verdict=verdict,
            decision=decision,
        )
        return self.commit(card=asdict(card))

    def commit(self, *, card: Mapping[str, Any] | None = None) -> str:
        """Commit all that there is, with a card if one is given."""
        if card is not None:
            write_json(self.root / "data/model.json", card)
        git(self.root, "add", "--all")
        git(self.root, "commit", "-q", "--allow-empty", "-m", "more")
        return git(self.root, "rev-parse", "HEAD")

    def commit_without_card(self) -> str:
        """Make a commit that no branch holds, with nothing of the project."""
        empty = git(self.root, "hash-object", "-t", "tree", "-w", "/dev/null")
        return git(self.root, "commit-tree", empty, "-m", "of another project")

    def card(self, commit: str) -> VersionCard:
        """Read the card that a commit holds."""
        return version_card_of(json.loads(git(self.root, "show", f"{commit}:./data/model.json")))

    def tags(self) -> list[str]:
        return git(self.root, "tag", "--list").splitlines()

    def current(self) -> str:
        """Return the version that `.models/current` points to."""
        return os.readlink(self.root / ".models/current")

    def served(self, path: str) -> str:
        """Read a file of the model that serves."""
        return (self.root / ".models/current" / path).read_text()


def make_repository(top: Path, inner: str = ".", *, dvc_in: str | None = None) -> Repository:
    """Make a repository with a project in it, where DVC stands in the project or elsewhere."""
    root = top / inner
    root.mkdir(parents=True)
    git(top, "init", "-q")
    where = top / (inner if dvc_in is None else dvc_in)
    dvc(where, "init", "-q", *(["--subdir"] if where != top else []))
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": _STAGES}))
    (root / ".gitignore").write_text("/.models/\n/.scratch/\n")
    return Repository(root)
