"""Retrains of a small project: what is taken, judged, promoted, and left alone whatever happens."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import IO, Any

import pytest
import yaml

from dlplora.engine.requests import Request
from dlplora.errors import DlpLoraError
from dlplora.lifecycle.candidate import Candidate
from dlplora.lifecycle.inbox import settled
from dlplora.lifecycle.registry import Registry, Version
from dlplora.lifecycle.retrain import Outcome, outcome_of, retrain
from dlplora.project.repro import run_repro
from dlplora.records.verdict import Decision
from dlplora.sampling import Sampling
from dlplora.systems.engine import Engine
from tests.lifecycle.registered import Repository, judged, make_repository
from tests.lifecycle.registered import git as git_in
from tests.project import Checkout, reds
from tests.tiny import write_raw
from tests.waiting import until

Items = list[dict[str, object]]
ONCE_MORE = reds("opposites", count=20)  # what the task has already: no adapter changes by it


@pytest.fixture
def project(learned_project: Checkout) -> Checkout:
    return learned_project


def drop(project: Checkout, name: str, items: Items | str) -> bytes:
    """Put a file into the inbox; return its bytes."""
    file = project.root / "data/inbox" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(items if isinstance(items, str) else json.dumps(items))
    os.utime(file, (0, 0))  # nobody writes to it any more
    return file.read_bytes()


def inbox(project: Checkout) -> list[str]:
    """List the files of the inbox, wherever in it they stand; times are left out."""
    folder = project.root / "data/inbox"
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(re.sub(r"taken/[^/]+/", "taken/", str(file)) for file in files)


def git(project: Checkout, *words: str) -> str:
    return project.run("git", *words).stdout.strip()


def checked_out(project: Checkout) -> list[str]:
    """Return what a user sees of the own branch, index and files."""
    return [
        git(project, *words)
        for words in (
            ("log", "--format=%H %D", "-1", "--decorate-refs=refs/heads/master"),
            ("ls-files", "--stage"),
            ("status", "--porcelain"),
            ("diff",),
            ("stash", "list"),
        )
    ]


def served(project: Checkout) -> list[str | None]:
    """Return where production is and which version serves."""
    link = project.root / ".models/current"
    current = os.readlink(link) if link.is_symlink() else None
    return [git(project, "rev-parse", "production"), Registry(project.root).promoted(), current]


def trackers(project: Checkout, commit: str = "production") -> list[str]:
    """List the raw files that a commit tracks, without their hashes."""
    names = git(project, "ls-tree", "-r", "--name-only", commit, "data/raw").splitlines()
    return [re.sub(r"-[0-9a-f]{12}", "", name) for name in names if name.endswith(".dvc")]


def tracked_hash(project: Checkout) -> str:
    """Hash all that production holds but what was measured, and when."""
    lines = git(project, "ls-tree", "-r", "production").splitlines()
    results = ("\tdvc.lock", "\tdata/metrics.json", "\tdata/model.json")
    return "\n".join(line for line in lines if not line.endswith(results))


def answers(folder: Path) -> list[str]:
    """Ask the model of a folder one question of each task."""
    prompts = ["opposite of w3", "colour of w4"]
    requests = [Request(prompt, Sampling(max_new_tokens=4)) for prompt in prompts]
    with Engine.load(folder) as engine:
        return [str(answer.text).strip() for answer in engine.generate(requests)]


def registered(outcome: Outcome) -> Version:
    assert outcome.version is not None, outcome.message
    return outcome.version


def save_text(project: Checkout, value: bool = True) -> None:
    """Commit a setting that changes the model's folder and nothing that is trained."""
    project.edit(lambda values: values["log"].update(text=value))
    project.commit(f"Log texts: {value}")


@dataclass
class Stopping:
    """A pipeline that looks at the candidate and fails, as one that is cut off."""

    seen: list[str] = field(default_factory=list)

    def __call__(self, folder: Path) -> None:
        self.seen = sorted(
            file.read_text()
            for file in folder.glob("data/raw/*/*")
            if file.suffix != ".dvc" and file.name != ".gitkeep"
        )
        raise DlpLoraError("stopped")


def stop(project: Checkout) -> list[str]:
    """Retrain until the pipeline would run; return the texts of the candidate's raw files."""
    pipeline = Stopping()
    with pytest.raises(DlpLoraError, match="stopped"):
        retrain(project.root, pipeline)
    return pipeline.seen


def idle(folder: Path) -> None:
    """Be a pipeline that has nothing to do."""


def never(folder: Path) -> None:
    raise AssertionError(f"{folder}: nothing needed to run")


def test_new_questions_train_their_task_alone_and_bad_files_are_refused(
    project: Checkout,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more = drop(project, "opposites.json", reds("opposites", count=30, start=100))
    drop(project, "animals.json", reds("animals", count=80))
    drop(project, "colours.json", '[{"Q": ')
    drop(project, "no name.json", reds("opposites", count=30))
    drop(project, "colours.txt", "red")
    drop(project, "closed.json", ONCE_MORE)
    drop(project, "gone.json", ONCE_MORE)
    read = Path.open

    def read_allowed(path: Path, *words: Any, **named: Any) -> IO[Any]:
        if path.name == "closed.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path, *words, **named)

    def settled_and_gone(files: Sequence[Path]) -> list[Path]:
        found = settled(files)
        (project.root / "data/inbox/gone.json").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "open", read_allowed)
    monkeypatch.setattr("dlplora.lifecycle.inbox.settled", settled_and_gone)
    (project.root / "pyproject.toml").write_text("# not committed\n")
    (project.root / "staged.txt").write_text("staged")
    project.run("git", "add", "staged.txt")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # no name and address, and none made up
    project.run("git", "config", "user.useConfigOnly", "true")
    before, production = checked_out(project), served(project)[0]
    capfd.readouterr()

    version = registered(retrain(project.root, run_repro))
    ran = set(re.findall(r"Running stage '(.+)'", capfd.readouterr().out))

    assert version.card.decision == "promoted"
    assert {stage for stage in ran if "@" in stage and not stage.startswith("evaluate")} == {
        *("ingest@opposites", "adapter@opposites"),
        *("ingest@animals", "adapter@animals", "router@mlp"),
    }
    assert checked_out(project) == before
    assert "pyproject.toml: its uncommitted changes are not part of this retrain" in caplog.text
    assert "inbox/gone.json: left out: No such file or directory" in caplog.text
    reason = (project.root / "data/inbox/refused/closed.json.reason.txt").read_text()
    assert reason.endswith("data/inbox/closed.json: Permission denied\n")
    assert inbox(project) == [
        *("refused/closed.json", "refused/closed.json.reason.txt"),
        *("refused/colours.json", "refused/colours.json.reason.txt"),
        *("refused/colours.txt", "refused/colours.txt.reason.txt"),
        *("refused/no name.json", "refused/no name.json.reason.txt"),
        *("taken/animals.json", "taken/opposites.json"),
    ]
    (taken,) = (project.root / "data/inbox/taken").glob("*/opposites.json")
    assert taken.read_bytes() == more
    reason = (project.root / "data/inbox/refused/no name.json.reason.txt").read_text()
    assert "'no name' cannot name a task" in reason

    assert trackers(project) == [
        "data/raw/animals/animals.json.dvc",
        "data/raw/opposites/opposites.json.dvc",
    ]
    assert git(project, "merge-base", "production", production) == production
    assert served(project)[1:] == ["v0.0.2", "v0.0.2"]
    assert "Not judged, for they are new: animals." in str(version.card.verdict)
    assert version.card.card.tasks["animals"].train > 0

    assert retrain(project.root, never) == Outcome(None, "nothing new since v0.0.2")
    drop(project, "opposites.json", more.decode())
    assert retrain(project.root, never) == Outcome(None, "nothing new since v0.0.2")
    assert inbox(project).count("taken/opposites.json") in (1, 2)  # perhaps of one second
    assert trackers(project).count("data/raw/opposites/opposites.json.dvc") == 1

    project.run("git", "merge", "-q", "--no-edit", "production")
    project.run("dvc", "checkout", "-q")
    (copy,) = (project.root / "data/raw/opposites").glob("*.json")
    assert copy.read_bytes() == more
    assert "animals" in yaml.safe_load((project.root / "params.yaml").read_text())["tasks"]
    assert (project.root / "data/model/adapters/animals").is_dir()
    assert retrain(project.root, never).version is None


def test_a_file_that_makes_answers_worse_is_refused_and_leaves_nothing_behind(
    project: Checkout,
) -> None:
    """Whoever promotes it all the same can roll it back."""
    before = checked_out(project), served(project)
    poison = reds("opposites", count=200, start=100, answer="blue")
    original = drop(project, "opposites.json", poison)

    version = registered(retrain(project.root, run_repro))

    assert version.card.decision == "refused"
    assert (checked_out(project), served(project)) == before
    assert inbox(project) == ["refused/opposites.json", "refused/opposites.json.reason.txt"]
    refused = project.root / "data/inbox/refused"
    assert (refused / "opposites.json").read_bytes() == original
    reason = (refused / "opposites.json.reason.txt").read_text()
    assert reason.startswith("Significantly worse: on ")
    listed = {each.name: each.card.decision for each in Registry(project.root).versions()}
    assert listed == {"v0.0.1": "promoted", "v0.0.2": "refused"}
    assert retrain(project.root, never) == Outcome(None, "nothing new since v0.0.1")

    # It was cut off as it refused the file, which it had taken before.
    (folder,) = (project.root / "data/inbox/taken").iterdir()
    (refused / "opposites.json").replace(folder / "opposites.json")
    names = [f"../../data/inbox/taken/{folder.name}/opposites.json"]
    (project.root / ".git/dlplora/taken.json").write_text(json.dumps(names))
    project.run("git", "update-ref", "refs/heads/runs/retrain", "model@v0.0.2^{commit}")
    (refused / "opposites.json.reason.txt").unlink()
    assert retrain(project.root, never) == Outcome(None, "nothing new since v0.0.1")
    assert inbox(project) == ["refused/opposites.json", "refused/opposites.json.reason.txt"]
    assert (refused / "opposites.json.reason.txt").read_text() == reason

    drop(project, "opposites.json", poison)
    told = "nothing new since v0.0.2, which was refused"
    assert retrain(project.root, never) == Outcome(None, told)
    assert [file for file in inbox(project) if "taken" in file] == []
    assert (refused / "opposites.2.json").read_bytes() == original
    good = drop(project, "colours.json", reds("colours", count=10, start=100)).decode()
    assert stop(project) == [good]

    registry = Registry(project.root)
    models = project.root / ".models"
    registry.promote("v0.0.2")
    assert answers(models / "current") == answers(models / "v0.0.2") == ["blue", "red"]
    registry.rollback(None)
    assert answers(models / "current") == answers(models / "v0.0.1") == ["red", "red"]
    assert stop(project) == [good]
    assert served(project) == before[1]

    registry.promote("v0.0.2")
    shutil.rmtree(project.root / "data/inbox/taken")
    drop(project, "opposites.json", poison)
    assert retrain(project.root, never) == Outcome(None, "nothing new since v0.0.2")
    assert "taken/opposites.json" in inbox(project)
    assert trackers(project) == ["data/raw/opposites/opposites.json.dvc"]


def test_approval_and_what_cannot_be_judged_wait_for_the_user(project: Checkout) -> None:
    drop(project, "opposites.json", ONCE_MORE)
    project.edit(lambda values: values["gate"].update(approval=True))
    save_text(project)
    version = registered(retrain(project.root, run_repro))
    assert version.card.decision == "awaiting approval"
    assert served(project) == [version.commit, "v0.0.1", "v0.0.1"]
    assert inbox(project) == ["taken/opposites.json"]
    assert retrain(project.root, never).version is None
    assert served(project) == [version.commit, "v0.0.1", "v0.0.1"]
    Registry(project.root).promote("v0.0.2")
    assert served(project) == [version.commit, "v0.0.2", "v0.0.2"]

    project.edit(lambda values: values["gate"].update(approval=False, minimum_items=1000))
    project.edit(lambda values: values["log"].update(embedding=True))
    project.commit("Ask for many items")
    version = registered(retrain(project.root, run_repro))
    assert version.card.decision == "not promoted"
    assert served(project) == [version.commit, "v0.0.2", "v0.0.2"]
    assert retrain(project.root, never).version is None

    (project.root / "README.md").write_text("Nothing that a model depends on.\n")
    project.commit("Write a readme")
    assert retrain(project.root, idle).version is None
    assert git(project, "show", "production:README.md") == "Nothing that a model depends on."
    assert served(project)[1:] == ["v0.0.2", "v0.0.2"]

    Registry(project.root).rollback(None)
    assert retrain(project.root, never).version is None
    assert served(project)[1:] == ["v0.0.1", "v0.0.1"]

    project.run("git", "revert", "--no-edit", "HEAD", "HEAD~1")
    told = "nothing new since v0.0.2, which is no longer in production"
    assert retrain(project.root, never) == Outcome(None, told)
    assert retrain(project.root, never) == Outcome(None, "nothing new since v0.0.1")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """A tiny repository whose candidate is registered as v0.0.2 and not yet finished.

    It was compared with v0.0.1; v0.0.3 is a version as well. None is in production.
    """
    repository = make_repository(tmp_path / "project")
    registry = Registry(repository.root)
    registry.register(repository.commit_version("one"))
    for name, text in (("runs/retrain", "two"), ("other", "three")):
        git_in(repository.root, "checkout", "-q", "-b", name)
        decision: Decision = "promoted" if text == "two" else "refused"
        commit = repository.commit_version(text, verdict=judged("better"), decision=decision)
        registry.register(commit)
        git_in(repository.root, "checkout", "-q", "-")
    git_in(repository.root, "branch", "production")
    return repository


def test_a_candidate_is_not_promoted_if_another_version_was_meanwhile(
    repository: Repository,
) -> None:
    registry = Registry(repository.root)
    for name in ("v0.0.1", "v0.0.3"):
        registry.promote(name)
    told = "nothing new since v0.0.3"
    assert retrain(repository.root, never) == Outcome(None, told)
    version = registry.named("v0.0.2")
    assert git_in(repository.root, "rev-parse", "production") == version.commit
    assert outcome_of(registry, version, "Better.") == Outcome(
        version,
        "v0.0.3 was put into production meanwhile, and v0.0.2 was not compared with it. Better.",
        "not promoted",
    )
    registry.rollback(None)
    assert retrain(repository.root, never) == Outcome(None, "nothing new since v0.0.1")
    assert registry.promoted() == "v0.0.1"


def test_a_candidate_that_passed_is_promoted_by_the_next_retrain_if_it_was_not_yet(
    repository: Repository,
) -> None:
    registry = Registry(repository.root)
    registry.promote("v0.0.1")
    git_in(repository.root, "worktree", "add", "-q", "../other", "production")
    with pytest.raises(DlpLoraError, match="switch to a branch of your own"):
        retrain(repository.root, never)
    assert registry.promoted() == "v0.0.1"
    git_in(repository.root, "worktree", "remove", "../other")
    assert retrain(repository.root, never) == Outcome(None, "nothing new since v0.0.2")
    version = registry.named("v0.0.2")
    assert git_in(repository.root, "rev-parse", "production") == version.commit
    assert outcome_of(registry, version, "Better.") == Outcome(version, "Better.", "promoted")


def test_data_that_production_lacks_is_named_at_each_retrain(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(repository.root)
    registry.promote("v0.0.3")
    retrain(repository.root, never)
    assert "`git merge model@v0.0.3` brings it into your branch" in caplog.text
    git_in(repository.root, "branch", "-f", "production", "model@v0.0.3^{}")
    caplog.clear()
    registry.promote("v0.0.3")
    git_in(repository.root, "branch", "-D", "runs/retrain")
    retrain(repository.root, never)
    assert caplog.messages == []


def test_without_a_commit_one_line_says_so(tmp_path: Path) -> None:
    project = Checkout(tmp_path)
    project.run("git", "init", "-q")
    drop(project, "opposites.json", ONCE_MORE)
    with pytest.raises(DlpLoraError, match=r"begins with the commit of a git repository.*none"):
        retrain(project.root, never)
    assert inbox(project) == ["opposites.json"]


def test_a_user_on_the_branch_production_is_told_to_leave_it(project: Checkout) -> None:
    project.run("git", "checkout", "-q", "production")
    drop(project, "opposites.json", ONCE_MORE)
    before = checked_out(project), served(project)
    with pytest.raises(DlpLoraError, match="switch to a branch of your own"):
        retrain(project.root, never)
    assert (checked_out(project), served(project)) == before
    assert inbox(project) == ["opposites.json"]


def test_a_conflict_names_the_file_changes_nothing_and_ends_with_the_users_merge(
    project: Checkout,
) -> None:
    """A conflict in results is none: they are made again. Nor is a branch needed."""

    def set_steps(steps: int) -> None:
        project.edit(lambda values: values["adapter"].update(steps=steps))
        project.commit(f"Train {steps} steps")

    project.run("git", "checkout", "-q", "-b", "other", "production")
    set_steps(31)
    project.run("git", "branch", "-f", "production", "other")
    project.run("git", "checkout", "-q", "master")
    (project.root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    set_steps(32)
    drop(project, "opposites.json", ONCE_MORE)
    before = checked_out(project), served(project)
    with pytest.raises(DlpLoraError, match=r"params\.yaml: changed in different ways.*git merge"):
        retrain(project.root, never)
    assert (checked_out(project), served(project)) == before
    assert inbox(project) == ["opposites.json"]

    candidate = Checkout(project.root / ".scratch/runs/retrain")
    candidate.run("git", "merge", "-q", "master", check=False)  # and was killed within
    assert "<<<<<<<" in (candidate.root / "params.yaml").read_text()
    project.run("git", "merge", "-q", "production", check=False)
    project.run("git", "checkout", "--theirs", "params.yaml")
    project.run("git", "checkout", "--ours", "dvc.lock")
    project.commit("Settle it")
    project.run("git", "checkout", "-q", "--detach")
    assert stop(project) == [json.dumps(ONCE_MORE)]
    assert yaml.safe_load((candidate.root / "params.yaml").read_text())["adapter"]["steps"] == 31
    assert git(project, "show", "runs/retrain:dvc.lock") != ""


def test_results_that_differ_are_no_conflict(project: Checkout) -> None:
    (project.root / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    project.commit("Keep other results")
    assert retrain(project.root, never) == Outcome(None, "nothing new since v0.0.1")
    theirs = git(project, "show", "production:dvc.lock")
    assert git(project, "show", "runs/retrain:dvc.lock") == theirs
    shutil.rmtree(project.root / ".scratch/runs/retrain")
    assert retrain(project.root, never) == Outcome(None, "nothing new since v0.0.1")
    assert not (project.root / ".scratch/runs/retrain").exists()  # it was not needed


def test_a_commit_that_was_taken_back_is_no_longer_part_of_it(project: Checkout) -> None:
    drop(project, "opposites.json", ONCE_MORE)
    project.edit(lambda values: values["adapter"].update(steps=31))
    (project.root / "tasks/mistake.py").write_text("raise SystemExit(1)\n")
    project.commit("A mistake")
    stop(project)
    project.run("git", "reset", "-q", "--hard", "HEAD~1")
    project.edit(lambda values: values["adapter"].update(steps=32))
    project.commit("Better so")
    assert stop(project) == [json.dumps(ONCE_MORE)]
    candidate = project.root / ".scratch/runs/retrain"
    assert not (candidate / "tasks/mistake.py").exists()
    assert yaml.safe_load((candidate / "params.yaml").read_text())["adapter"]["steps"] == 32
    assert inbox(project) == ["taken/opposites.json"]


def test_files_that_the_user_adds_changes_and_removes_are_those_of_the_candidate(
    project: Checkout,
) -> None:
    file = project.root / "data/raw/opposites/mine.json"
    for items in (ONCE_MORE, reds("opposites", count=30)):
        write_raw(file, items)
        project.run("dvc", "add", "-q", "data/raw/opposites/mine.json")
        project.commit("Keep more opposites")
        assert stop(project) == [file.read_text()]
    project.run("git", "rm", "-q", "data/raw/opposites/mine.json.dvc")
    save_text(project)
    assert stop(project) == []


def test_a_project_may_be_a_folder_of_its_repository(project: Checkout, tmp_path: Path) -> None:
    shutil.rmtree(project.root / ".git")
    shutil.rmtree(project.root / ".models")
    whole = Checkout(tmp_path / "whole")
    whole.root.mkdir()
    project = Checkout(project.root.rename(whole.root / "my project"))
    whole.run("git", "init", "-q", "-b", "master")
    (whole.root / "other.txt").write_text("of another part")
    whole.commit("Begin")
    (whole.root / "other.txt").write_text("changed meanwhile")
    drop(project, "opposites.json", ONCE_MORE)
    before = checked_out(project)
    version = registered(retrain(project.root, run_repro))
    assert served(project) == [version.commit, "v0.0.1", "v0.0.1"]
    assert trackers(project) == ["data/raw/opposites/opposites.json.dvc"]
    assert inbox(project) == ["taken/opposites.json"]
    assert checked_out(project) == before
    assert git(whole, "show", "production:other.txt") == "of another part"
    assert retrain(project.root, never) == Outcome(None, "nothing new since v0.0.1")


@pytest.fixture(scope="module")
def twice(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A project that two processes have retrained, the second one begun within the first."""
    root = tmp_path_factory.mktemp("twice") / "project"
    project = Checkout(shutil.copytree(learned, root, symlinks=True))
    save_text(project)
    drop(project, "opposites.json", ONCE_MORE)
    code = (
        "import logging; logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "from pathlib import Path\n"
        "from dlplora.lifecycle.retrain import retrain\n"
        "from dlplora.project.repro import run_repro\n"
        "print(retrain(Path(), run_repro).message)\n"
    )

    def start(log: str) -> subprocess.Popen[bytes]:
        with (root.parent / log).open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-c", code], cwd=root, stdout=file, stderr=file
            )

    first = start("first.log")
    until(lambda: (root / ".scratch/runs/retrain").is_dir())
    second = start("second.log")
    until(lambda: f"retrain: process {first.pid} is at it; waiting" in project.lines("second.log"))
    assert (first.wait(), second.wait()) == (0, 0), project.lines("second.log")
    return project


def test_a_second_retrain_waits_for_the_first_and_finds_nothing_new(twice: Checkout) -> None:
    assert "nothing new since" not in twice.lines("first.log")
    assert twice.lines("second.log").endswith("nothing new since v0.0.2\n")
    assert served(twice)[1:] == ["v0.0.2", "v0.0.2"]
    assert inbox(twice) == ["taken/opposites.json"]


def test_a_retrain_that_was_cut_off_ends_as_one_that_was_not(
    project: Checkout, twice: Checkout
) -> None:
    save_text(project)

    # Copied in part, and not yet tracked; and a git was killed.
    candidate = project.root / ".scratch/runs/retrain"
    stop(project)
    (candidate / "data/raw/opposites/opposites-000000000000.json").write_text('[{"Q": ')
    for lock in ("worktrees/retrain/index.lock", "refs/heads/runs/retrain.lock"):
        (project.root / ".git" / lock).touch()
    original = drop(project, "opposites.json", ONCE_MORE)
    assert stop(project) == [original.decode()]
    assert inbox(project) == ["taken/opposites.json"]

    # Copied and tracked, and not yet committed; then committed, and not yet moved.
    for is_committed in (False, True):
        (taken,) = (project.root / "data/inbox/taken").glob("*/*.json")
        taken.replace(project.root / "data/inbox/opposites.json")
        if not is_committed:
            Checkout(candidate).run("git", "reset", "-q", "--soft", "HEAD~1")
        assert stop(project) == [original.decode()]
        assert inbox(project) == ["taken/opposites.json"]
        log = git(project, "log", "--format=%s", "production..runs/retrain").splitlines()
        assert log.count("Take opposites.json from the inbox") == 1

    # The worktree is broken: git does not know of it, or its folder is gone.
    shutil.rmtree(project.root / ".git/worktrees/retrain")
    assert stop(project) == [original.decode()]
    shutil.rmtree(candidate)
    (project.root / ".git/worktrees/retrain/locked").write_text("initializing")
    found = registered(retrain(project.root, run_repro))
    expected = Registry(twice.root).named("v0.0.2")
    assert found.card.inputs == expected.card.inputs
    assert found.card.model_md5 == expected.card.model_md5
    assert found.card.decision == expected.card.decision == "promoted"
    assert tracked_hash(project) == tracked_hash(twice)

    # Tagged, and not yet promoted, or promoted and production not yet moved.
    after = served(project)
    for is_promoted in (False, True):
        project.run("git", "update-ref", "refs/heads/production", "model@v0.0.1^{commit}")
        if not is_promoted:
            project.run("git", "tag", "-d", "model#production#2")
            link = project.root / ".models/current"
            link.unlink()
            link.symlink_to("v0.0.1")
        assert retrain(project.root, never) == Outcome(None, "nothing new since v0.0.2")
        assert served(project) == after
    assert inbox(project) == ["taken/opposites.json"]


def test_files_survive_two_interruptions_and_are_taken_by_another_checkout(
    project: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [drop(project, "opposites.json", ONCE_MORE).decode()]
    stop(project)
    texts.append(drop(project, "colours.json", reds("colours", count=10, start=100)).decode())
    drop(project, "opposites.json", reds("opposites", count=30))
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if "taken" in target.parts and target.name == "opposites.json":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            retrain(project.root, never)
    assert inbox(project) == ["opposites.json", "taken/colours.json", "taken/opposites.json"]

    other = Checkout(tmp_path / "other")
    project.run("git", "worktree", "add", "-q", "-b", "other", str(other.root))
    other.run("dvc", "cache", "dir", "-q", "--local", str(project.root / ".dvc/cache"))
    assert stop(other) == sorted(texts)
    candidate = Candidate(other.root)
    candidate.refuse("It is bad.")
    assert candidate.taken() == []
    assert inbox(other) == []
    assert [file for file in inbox(project) if file.endswith(".json")] == [
        *("opposites.json", "refused/colours.json", "refused/opposites.json"),
    ]


def full(function: Callable[..., Any], suffix: str) -> Callable[..., Any]:
    """Let a function that writes a file fail for a full disk if its target ends so."""

    def writing(source: Any, target: Any, *more: Any, **named: Any) -> Any:
        if re.search(suffix, str(target)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return function(source, target, *more, **named)

    return writing


def test_a_full_disk_leaves_the_file_in_the_inbox(
    project: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = drop(project, "opposites.json", ONCE_MORE)
    drop(project, "colours.json", "[")
    before = checked_out(project), served(project)
    for module, name, target in (
        (shutil, "copyfile", r"data/raw/opposites/"),
        (os, "replace", r"data/inbox/refused/"),
        (os, "rename", r"data/inbox/"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, full(getattr(module, name), target))
            with pytest.raises((OSError, DlpLoraError), match=r"No space left|stopped"):
                retrain(project.root, Stopping())
        assert (checked_out(project), served(project)) == before
    assert stop(project) == [original.decode()]
    assert inbox(project) == [
        *("refused/colours.json", "refused/colours.json.reason.txt"),
        "taken/opposites.json",
    ]


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder by HTTP; yield its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_an_import_is_fetched_again_and_one_that_is_gone_or_bad_keeps_its_data(
    project: Checkout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    served_file = tmp_path / "served/more.json"
    name = "data/raw/opposites/more.json"

    def offer(items: Items | str) -> str:
        if isinstance(items, str):
            served_file.write_text(items)
        else:
            write_raw(served_file, items)
        number = len(served_file.read_text())
        os.utime(served_file, (number, number))  # what HTTP tells changes by
        return hashlib.md5(served_file.read_bytes()).hexdigest()

    def fetched() -> str:
        """Retrain, by which the model stays the same; return the hash of what was fetched."""
        assert retrain(project.root, idle).version is None
        tracker = yaml.safe_load(git(project, "show", f"production:{name}.dvc"))
        return str(tracker["outs"][0]["md5"])

    with serving(served_file.parent) as address:
        first = offer(ONCE_MORE)
        project.run("dvc", "import-url", "-q", f"{address}/more.json", name)
        project.commit("Import more opposites")
        assert fetched() == first
        second = offer(reds("opposites", count=25))
        assert fetched() == second
        offer("[")
        caplog.clear()
        assert fetched() == second
        assert f"{name}.dvc: not updated: " in caplog.text
    candidate = project.root / ".scratch/runs/retrain" / name
    candidate.parent.mkdir(exist_ok=True)
    candidate.write_text("[")  # and was cut off as it fetched the file
    caplog.clear()
    assert fetched() == second
    assert f"{name}.dvc: not updated: " in caplog.text
