"""Runs with other parameters in worktrees: a branch each, one cache, and the old ones deleted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import State

from dlplora.errors import DlpLoraError
from dlplora.project.files import Project
from dlplora.project.repro import repro_suite
from dlplora.project.worktrees import (
    WorktreeError,
    clear_locks,
    commit_all,
    commit_of,
    delete_old,
    merge,
    open_worktree,
    refuse_checked_out,
    shared_folder,
    uncommitted,
)
from dlplora.scratch import alone
from flows import experiment, shown
from flows.experiment import Lora, Router
from tests.flows.dummies import ROOT, Ended, Tree, ended, make_tree
from tests.lifecycle.registered import Repository, git, make_repository


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """A tree with the suite `pairs`, up to date, as the project that experiments begin with."""
    tree = make_tree(tmp_path / "project")
    values = yaml.safe_load((tree.root / "params.yaml").read_text())
    header = ("seed", "runtime", "flow", "answers", "gate", "log", "base_model")
    suite = {name: section for name, section in values.items() if name not in header}
    (tree.root / "suites/pairs.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    assert tree.flow().state.is_completed()
    tree.commit()
    monkeypatch.setattr(experiment, "ROOT", tree.root)
    monkeypatch.setattr(shown, "REPORTS", tree.root / ".scratch/reports")
    return tree


def stages(state: State[Any]) -> list[Ended]:
    """Return what became of the runs that an experiment started, the first one first."""
    run_id = state.state_details.flow_run_id
    assert run_id is not None
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run_id])
            )
        )
    runs = sorted(runs, key=lambda run: run.start_time)
    return [ended(run.state) for run in runs if run.state is not None]


def folders(tree: Tree) -> list[str]:
    return sorted(folder.name for folder in (tree.root / ".scratch/runs").iterdir())


def test_a_run_of_the_same_parameters_is_restored_from_the_shared_cache(tree: Tree) -> None:
    state = experiment.experiment("pairs", return_state=True)
    (run,) = stages(state)
    assert state.is_completed(), state.message
    assert run.named("Completed") == set()
    (name,) = folders(tree)
    assert f"runs/{name}" in str(state.message)
    worktree = tree.root / ".scratch/runs" / name
    assert (worktree / "data/report/index.html").exists()
    assert (tree.root / ".scratch/reports" / name / "index.html").exists()
    assert tree.run("git", "status", "--porcelain") == ""
    assert Tree(worktree).run("git", "status", "--porcelain") == ""
    log = tree.run("git", "log", "--format=%s", f"runs/{name}", "-1")
    assert log == f"Set the parameters of run {name}\n"  # the results are those committed


def test_the_form_changes_params_of_its_branch_alone(tree: Tree) -> None:
    before = (tree.root / "params.yaml").read_bytes()
    state = experiment.experiment(
        "pairs",
        tasks=["colours"],
        lora=Lora(rank=5, steps=7),
        router=Router(hidden=9, p=0.5),
        seeds=[3, 4],
        return_state=True,
    )
    assert state.is_completed(), state.message
    assert (tree.root / "params.yaml").read_bytes() == before
    runs = sorted(folders(tree), key=lambda name: name.rpartition("-")[2])
    for name, seed in zip(runs, (3, 4), strict=True):
        worktree = tree.root / ".scratch/runs" / name
        values = yaml.safe_load((worktree / "params.yaml").read_text())
        assert name.endswith(f"-seed{seed}")
        assert values["seed"] == seed
        assert list(values["tasks"]) == list(values["adapters"]) == ["colours"]
        assert (values["adapter"]["rank"], values["adapter"]["steps"]) == (5, 7)
        assert values["adapter"]["alpha"] == 4
        assert values["routers"]["mlp"]["hidden"] == 9
        assert values["systems"]["dlp_mlp"]["p"] == 0.5
    assert {"adapter@colours", "compare"} == set.intersection(
        *(run.told("ran") for run in stages(state))
    )
    logs = [tree.run("git", "log", "--format=%s", f"runs/{name}", "-1") for name in runs]
    assert logs == [f"Keep the results of run {name}\n" for name in runs]
    shows = ended(state).artifacts
    assert all(f"runs/{name}" in shows["runs"] for name in runs)
    assert json.loads(shows["seeds"])[0].keys() == {"system", "mean", "seed3", "seed4"}
    again = experiment.experiment(
        "pairs",
        tasks=["colours"],
        lora=Lora(rank=5, steps=7),
        router=Router(hidden=9, p=0.5),
        seeds=[3],
        return_state=True,
    )
    assert [len(run.told("up to date")) for run in stages(again)] == [4]
    assert folders(tree) == sorted(runs)


def test_a_suite_runs_in_a_worktree_and_leaves_the_tree_as_it_is(
    tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = yaml.safe_load((tree.root / "params.yaml").read_text())["adapter"]
    suite = yaml.safe_load((tree.root / "suites/pairs.yaml").read_text())
    suite["adapter"] = adapter | {"steps": adapter["steps"] + 1}
    (tree.root / "suites/longer.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    tree.commit()
    file = tree.root / "params.yaml"
    file.write_text(file.read_text() + "# a note\n")
    folder = repro_suite(Project(tree.root), "longer")
    assert "params.yaml: its uncommitted changes are not part of this run" in caplog.messages
    assert tree.run("git", "status", "--porcelain") == " M params.yaml\n"
    params = yaml.safe_load((folder / "params.yaml").read_text())
    assert params["adapter"]["steps"] == adapter["steps"] + 1
    assert (folder / "data/report/index.html").exists()
    branch = f"runs/{folder.name}"
    log = tree.run("git", "log", "--format=%s", branch, "-1")
    assert log == "Keep the results of the suite longer\n"
    assert repro_suite(Project(tree.root), "longer") == folder  # nothing to do


def test_a_suite_that_fails_in_its_worktree_is_one_line(tree: Tree) -> None:
    (tree.root / "suites/colours.txt").write_text("bad")
    tree.commit()
    with pytest.raises(DlpLoraError, match=r"`dlplora repro` ended with exit code 255"):
        repro_suite(Project(tree.root), "pairs")


def test_an_own_files_task_is_checked_out_from_the_shared_cache(tree: Tree) -> None:
    raw = tree.root / "data/raw/mine"
    raw.mkdir(parents=True)
    (raw / "mine.json").write_text("[]")
    shutil.copyfile(ROOT / ".gitignore", tree.root / ".gitignore")
    tree.run("dvc", "add", "-q", "data/raw/mine/mine.json")
    tree.commit()
    worktree = open_worktree(tree.root, "one")
    assert (worktree / "data/raw/mine/mine.json").read_text() == "[]"


@pytest.mark.parametrize("shared", ["downloads", "answers"])
def test_a_worktree_shares_downloads_and_answers_also_when_the_project_moved(
    tree: Tree, shared: str
) -> None:
    place = Path(".scratch", shared)
    worktree = open_worktree(tree.root, "one")
    (worktree / place / "kept").touch()
    assert (tree.root / place / "kept").is_file()
    (worktree / place).unlink()
    (worktree / place).symlink_to(tree.root / "where-it-was")
    assert (open_worktree(tree.root, "one") / place / "kept").is_file()

    shutil.rmtree(tree.root / place)
    (tree.root / place).touch()
    with pytest.raises(WorktreeError, match=rf"\.scratch/{shared}: cannot be a link to "):
        open_worktree(tree.root, "two")


def test_an_unknown_task_is_one_line(tree: Tree) -> None:
    state = experiment.experiment("pairs", tasks=["nosuch"], return_state=True)
    assert state.is_failed()
    assert str(state.message) == ("suite pairs: no task nosuch; there are: colours, opposites")


def test_old_worktrees_are_deleted_but_not_those_at_work(tree: Tree) -> None:
    made = [open_worktree(tree.root, name) for name in ("a", "b", "c", "d")]
    with alone("repro", scratch=made[0] / ".scratch"):
        assert delete_old(tree.root, keep=2) == ["b"]
    assert folders(tree) == ["a", "c", "d"]
    assert "runs/b" in tree.run("git", "branch", "--list", "runs/*")
    assert open_worktree(tree.root, "b").is_dir()


def _state(tree: Tree) -> list[str]:
    """What a commit on a user's own branch, or of a user's own index, would change."""
    asked = (("log", "--format=%H %D"), ("status", "--porcelain"), ("branch", "--show-current"))
    return [tree.run("git", *words) for words in asked]


def test_a_left_folder_that_is_no_worktree_is_refused_and_nothing_is_committed(tree: Tree) -> None:
    (tree.root / "suites/new.txt").write_text("not yet committed")
    name = f"pairs-{commit_of(tree.root)[:8]}"
    left = tree.root / ".scratch/runs" / name
    left.mkdir(parents=True)
    (left / "params.yaml").write_bytes((tree.root / "params.yaml").read_bytes())
    before = _state(tree)
    with pytest.raises(DlpLoraError, match=r"expected a worktree on its branch runs/.*move it"):
        repro_suite(Project(tree.root), "pairs")
    with pytest.raises(DlpLoraError, match=r"expected a worktree on its branch runs/"):
        commit_all(left, "Keep the results")
    assert _state(tree) == before
    assert delete_old(tree.root, keep=1) == []
    assert (left / "params.yaml").exists()


def test_what_the_user_has_checked_out_is_never_committed_to(tree: Tree) -> None:
    run = open_worktree(tree.root, "one")
    other = tree.root.parent / "runs/mine"
    tree.run("git", "worktree", "add", "-q", "-b", "work", str(other))
    Tree(run).run("git", "checkout", "-q", "-b", "a-fix")  # within a run's worktree
    tree.run("git", "checkout", "-q", "runs/one")
    for folder in (tree.root, other, run):
        (folder / "new.txt").write_text("new")
        before = _state(Tree(folder))
        with pytest.raises(DlpLoraError, match=r"expected a worktree on its branch runs/"):
            commit_all(folder, "Keep the results")
        assert _state(Tree(folder)) == before


def test_hooks_of_the_user_are_for_commits_of_the_user(tree: Tree) -> None:
    for hook in ("pre-commit", "post-commit", "post-checkout"):
        file = tree.root / ".git/hooks" / hook
        file.write_text(f"#!/bin/sh\ntouch '{tree.root}/{hook}.ran'; exit 1\n")
        file.chmod(0o755)
    run = open_worktree(tree.root, "one")
    (run / "new.txt").write_text("new")
    commit_all(run, "Keep the results")
    assert Tree(run).run("git", "log", "--format=%s", "-1") == "Keep the results\n"
    assert not list(tree.root.glob("*.ran"))


def test_a_project_may_be_a_folder_of_a_repository(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "made")
    whole = Tree(tmp_path / "whole")
    whole.root.mkdir()
    shutil.rmtree(tree.root / ".git")
    tree = Tree(tree.root.rename(whole.root / "my project"))
    (whole.root / "other.txt").write_text("of another part")
    whole.run("git", "init", "-q")
    whole.commit()
    (whole.root / "other.txt").write_text("changed meanwhile")
    assert uncommitted(tree.root) == []
    folder = open_worktree(tree.root, "one")
    assert folder == tree.root / ".scratch/runs/one/my project"
    assert (folder / "params.yaml").is_file()
    (folder / "params.yaml").write_text("changed")
    (folder.parent / "other.txt").write_text("changed")
    commit_all(folder, "Keep the results")
    shown = Tree(folder).run("git", "show", "--format=", "--name-only", "HEAD")
    assert shown == "my project/params.yaml\n"
    with alone("repro", scratch=folder / ".scratch"):
        open_worktree(tree.root, "two")
        assert delete_old(tree.root, keep=1) == []
    assert delete_old(tree.root, keep=1) == ["one"]


def test_all_checkouts_of_a_repository_share_a_folder_for_locks(tmp_path: Path) -> None:
    tree = Tree(tmp_path / "project")
    (tree.root / "inner").mkdir(parents=True)
    (tree.root / "inner/file").touch()
    tree.run("git", "init", "-q")
    tree.commit()
    tree.run("git", "worktree", "add", "-q", "../other")
    folders = [tree.root, tree.root / "inner", tmp_path / "other"]
    assert {shared_folder(folder) for folder in folders} == {tree.root / ".git/dlplora"}


def test_locks_are_cleared_of_the_retrains_alone(tmp_path: Path) -> None:
    project = make_repository(tmp_path / "project").root
    (project / "params.yaml").touch()
    Repository(project).commit()
    git(project, "worktree", "add", "-q", "../retrain")  # the user's
    own = open_worktree(project, "retrain")
    folders = [
        Path(git(folder, "rev-parse", "--git-dir")) for folder in (tmp_path / "retrain", own)
    ]
    refs = project / ".git/refs"
    users = [folders[0] / "index.lock", project / ".git/index.lock", refs / "tags/models.lock"]
    left = [folders[1] / "index.lock", refs / "heads/production.lock", refs / "tags/model@v1.lock"]
    for lock in (*users, *left):
        lock.touch()
    clear_locks(project, ["production"], tags=["model@v*"])
    assert [lock for lock in (*users, *left) if lock.exists()] == users
    shutil.rmtree(own)
    own.mkdir()
    clear_locks(project, ["production"], tags=["model@v*"])
    assert [lock for lock in (*users, *left) if lock.exists()] == users


def test_a_branch_that_retrains_move_may_not_be_checked_out_by_the_user(tmp_path: Path) -> None:
    project = make_repository(tmp_path / "project").root
    (project / "params.yaml").touch()
    Repository(project).commit()
    open_worktree(project, "retrain")
    git(project, "branch", "production")
    branches = ("production", "runs/retrain")
    refuse_checked_out(project, branches)
    for branch in branches:
        git(project, "worktree", "add", "-q", "--force", "../other", branch)
        with pytest.raises(WorktreeError, match=rf"other: the branch {branch}, .*switch to"):
            refuse_checked_out(project, branches)
        shutil.rmtree(tmp_path / "other")
        refuse_checked_out(project, branches)


def test_conflicts_outside_the_projects_folder_are_named_and_results_are_none(
    tmp_path: Path,
) -> None:
    project = make_repository(tmp_path / "whole", "my project")
    whole = Repository(tmp_path / "whole")

    def write(folder: Path, text: str) -> None:
        for name in ("ä b.txt", "my project/dvc.lock"):
            (folder / name).write_text(text)

    (project.root / "params.yaml").touch()
    write(whole.root, "one")
    whole.commit()
    folder = open_worktree(project.root, "one")
    top = Repository(folder.parent)
    write(top.root, "two")
    before = top.commit()
    write(whole.root, "three")
    with pytest.raises(WorktreeError, match=r"^ä b\.txt: changed in different ways [^\n]+$"):
        merge(folder, whole.commit(), results=["dvc.lock"])
    assert git(top.root, "status", "--porcelain") == ""
    assert git(top.root, "rev-parse", "HEAD") == before
    (whole.root / "ä b.txt").write_text("two")
    merge(folder, whole.commit(), results=["dvc.lock"])
    assert (folder / "dvc.lock").read_text() == "two"


def test_a_project_may_be_a_submodule(tmp_path: Path) -> None:
    made = make_tree(tmp_path / "made")
    whole = Tree(tmp_path / "whole")
    whole.root.mkdir()
    whole.run("git", "init", "-q")
    allowed = ("-c", "protocol.file.allow=always")
    whole.run("git", *allowed, "submodule", "--quiet", "add", str(made.root), "part")
    folder = open_worktree(whole.root / "part", "one")
    assert Tree(folder).run("dvc", "status", "--json", "compare").startswith('{"compare"')


@pytest.mark.parametrize("words", [[], ["git", "init", "-q"]], ids=["no git", "no commit"])
def test_without_a_commit_one_line_says_so(tmp_path: Path, words: list[str]) -> None:
    if words:
        Tree(tmp_path).run(*words)
    with pytest.raises(DlpLoraError, match=r"begins with the commit of a git repository.*none"):
        commit_of(tmp_path)


def test_variables_of_another_repository_lead_nowhere(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = commit_of(tree.root)
    other = make_tree(tree.root.parent / "other")
    monkeypatch.setenv("GIT_DIR", str(other.root / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other.root))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other.root / ".git/index"))
    run = open_worktree(tree.root, "one")
    (run / "new.txt").write_text("new")
    commit_all(run, "Keep the results")
    monkeypatch.undo()
    assert commit_of(tree.root) == here
    assert tree.run("git", "log", "--format=%s", "runs/one", "-1") == "Keep the results\n"
    assert other.run("git", "branch", "--list", "runs/*") == ""
