"""DVC's cache and the remotes over real git and DVC: what is kept, freed, sent and fetched."""

import os
import shutil
from pathlib import Path

import pytest

from dlplora.lifecycle.registry import Registry
from dlplora.lifecycle.storage import delete_unused, pull, push, unused_bytes
from dlplora.project.worktrees import WorktreeError, open_worktree
from dlplora.scratch import alone
from tests.lifecycle.registered import Repository, dvc, git, make_repository
from tests.project import ROOT

_ORPHAN = "an orphan that nothing needs"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository where a tag, a branch, a worktree and the workspace need a model each.

    Two versions were in production; a model and a base model more were made, and never committed.
    """
    root = tmp_path_factory.mktemp("template") / "project"
    repository = make_repository(root)
    registry = Registry(root)
    shutil.copyfile(ROOT / ".gitignore", root / ".gitignore")  # which DVC heeds as well
    (root / "params.yaml").write_text("seed: 0\n")
    for text in ("tagged", "in production"):
        registry.register(repository.commit_version(text))
    git(root, "branch", "production")
    for version in ("v0.0.1", "v0.0.2"):
        registry.promote(version)
    repository.commit_version("of a branch")
    git(root, "branch", "runs/one")
    repository.commit_version(_ORPHAN, base="an orphaned base")
    git(root, "reset", "-q", "--hard", "HEAD~1")
    (root / "source/model/weights").write_text("of the workspace")
    dvc(root, "repro", "-q")
    return root


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Repository:
    shutil.copytree(template, tmp_path / "project", symlinks=True)
    return Repository(tmp_path / "project")


def add_raw(root: Path) -> Path:
    """Let DVC track a raw file."""
    file = root / "data/raw/colours/mine.json"
    file.parent.mkdir(parents=True)
    file.write_text("[1]")
    dvc(root, "add", "-q", "data/raw/colours/mine.json")
    return file


def cached(root: Path) -> dict[Path, int]:
    """Return the sizes of all cached files."""
    files = (root / ".dvc/cache/files").rglob("*")
    return {file.relative_to(root): file.stat().st_size for file in files if file.is_file()}


def had(repository: Repository, revision: str, to: Path) -> str:
    """Return the weights of a revision's model, which DVC gets from the cache."""
    dvc(to.parent, "get", str(repository.root), "data/model", "--rev", revision, "-o", str(to))
    return (to / "weights").read_text()


def test_what_anything_needs_is_kept_and_the_rest_is_counted_and_freed(
    repository: Repository, tmp_path: Path
) -> None:
    root = repository.root
    git(root, "branch", "runs/two", "runs/one")
    worktree = open_worktree(root, "two")
    (worktree / "source/model/weights").write_text("of a worktree")
    dvc(worktree, "repro", "-q")
    raw = [add_raw(folder) for folder in (root, worktree)]  # neither is committed
    before = cached(root)

    count, size = unused_bytes(root)
    assert cached(root) == before
    delete_unused(root)
    freed = {file: size for file, size in before.items() if file not in cached(root)}
    assert (count, size) == (len(freed), sum(freed.values()))
    assert len(_ORPHAN) in freed.values()
    assert unused_bytes(root) == (0, 0)

    assert had(repository, "model@v0.0.1", tmp_path / "one") == "tagged"
    assert had(repository, "production", tmp_path / "two") == "in production"
    assert had(repository, "runs/one", tmp_path / "three") == "of a branch"
    for folder, text in ((root, "of the workspace"), (worktree, "of a worktree")):
        shutil.rmtree(folder / "data/model")
        dvc(folder, "checkout", "--force", "data/model")
        assert (folder / "data/model/weights").read_text() == text
    for file in raw:
        file.unlink()
        dvc(file.parent, "checkout")
        assert file.read_text() == "[1]"

    assert sorted(path.name for path in (root / ".models").iterdir()) == ["current", "v0.0.2"]
    assert repository.served("weights") == "in production"
    Registry(root).rollback(None)
    assert repository.served("weights") == "tagged"


@pytest.mark.parametrize(("lock", "folder"), [("repro", ".scratch"), ("retrain", ".git/dlplora")])
def test_nothing_is_freed_while_a_run_or_a_retrain_is_at_work(
    repository: Repository, lock: str, folder: str
) -> None:
    before = cached(repository.root)
    with alone(lock, scratch=repository.root / folder):
        for act in (unused_bytes, delete_unused):
            with pytest.raises(WorktreeError, match=r"is at work.*; wait until it has ended"):
                act(repository.root)
    assert cached(repository.root) == before


def test_nothing_is_freed_while_a_run_in_a_worktree_is_at_work(repository: Repository) -> None:
    worktree = open_worktree(repository.root, "two", start="runs/one")
    with (
        alone("repro", scratch=worktree / ".scratch"),
        pytest.raises(WorktreeError, match=r"runs/two.*: a run is at work"),
    ):
        delete_unused(repository.root)


def test_a_folder_of_a_repository_keeps_what_its_worktrees_need(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "whole", "my project")
    (repository.root / "params.yaml").write_text("seed: 0\n")
    repository.commit_version("committed")
    worktree = open_worktree(repository.root, "one")
    (worktree / "source/model/weights").write_text("of a worktree")
    dvc(worktree, "repro", "-q")
    assert unused_bytes(repository.root) == (0, 0)


def remotes(repository: Repository, folder: Path, *, git_remote: str | None = "origin") -> None:
    """Give a repository a bare remote of git, perhaps, and one of DVC."""
    if git_remote is not None:
        git(folder, "init", "-q", "--bare", "bare")
        git(repository.root, "remote", "add", git_remote, str(folder / "bare"))
    dvc(repository.root, "remote", "add", "-q", "-d", "store", str(folder / "store"))
    git(repository.root, "add", ".dvc/config")
    git(repository.root, "commit", "-q", "-m", "Add a remote", "--", ".dvc/config")


def test_a_clone_has_all_versions_after_a_pull_and_sends_its_own_back(
    repository: Repository, tmp_path: Path
) -> None:
    remotes(repository, tmp_path)
    raw = add_raw(repository.root)
    git(repository.root, "add", f"{raw}.dvc")
    git(repository.root, "commit", "-q", "-m", "Add colours")
    git(repository.root, "push", "-q", "origin", "HEAD:refs/heads/main")
    assert push(repository.root) == "origin"
    git(repository.root, "tag", "mine")
    assert push(repository.root) == "origin"  # a second time, and no other tag
    git(tmp_path, "clone", "-q", "-b", "main", "--no-tags", str(tmp_path / "bare"), "clone")
    clone = Repository(tmp_path / "clone")

    assert pull(clone.root) == "origin"
    assert clone.served("weights") == "in production"
    assert clone.served("base/weights") == "base one"
    assert (clone.root / "data/model/weights").read_text() == "of a branch"
    assert (clone.root / "data/raw/colours/mine.json").read_text() == "[1]"
    one, two = Registry(repository.root), Registry(clone.root)
    assert two.history() == one.history()
    assert two.versions() == one.versions()
    assert "mine" not in clone.tags()
    assert git(clone.root, "rev-parse", "production") == git(
        repository.root, "rev-parse", "production"
    )

    two.rollback(None)
    assert push(clone.root) == "origin"
    assert pull(repository.root) == "origin"
    assert one.history() == two.history()
    assert repository.served("weights") == "tagged"


def test_another_remote_than_origin_is_used_where_it_is_the_only_one(
    repository: Repository, tmp_path: Path
) -> None:
    remotes(repository, tmp_path, git_remote="backup")
    assert push(repository.root) == "backup"
    assert git(tmp_path / "bare", "tag").splitlines() == repository.tags()
    assert git(tmp_path / "bare", "branch") == "production"
    assert pull(repository.root) == "backup"


def test_without_a_remote_of_git_the_data_alone_goes_and_comes(
    repository: Repository, tmp_path: Path
) -> None:
    remotes(repository, tmp_path, git_remote=None)
    assert push(repository.root) is None
    git(repository.root, "stash", "-q")
    for folder in (".dvc/cache", ".models", "data/model", "data/base"):
        shutil.rmtree(repository.root / folder)
    assert pull(repository.root) is None
    assert repository.served("weights") == "in production"
    assert os.listdir(repository.root / "data/model")
