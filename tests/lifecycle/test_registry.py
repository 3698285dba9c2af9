"""The registry over real git, DVC and gto: versions, promotions, rollbacks, checkouts."""

import errno
import logging
import os
import re
import shutil
from pathlib import Path

import pytest

from dlplora.lifecycle.registry import Registry, RegistryError
from dlplora.records.files import read_json
from dlplora.records.model_card import version_card_of
from dlplora.sampling import Sampling
from dlplora.systems.engine import Engine
from tests.lifecycle.registered import Repository, dvc, git, judged, make_repository
from tests.lifecycle.serving import write_serving_project

PROMPTS = ["say red", "what is the opposite of up ?", "which colour : one a b ?"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with four registered versions, the third on another base model."""
    repository = make_repository(tmp_path_factory.mktemp("template") / "project")
    registry = Registry(repository.root)
    registry.register(repository.commit_version("model one"))
    registry.register(repository.commit_version("model two", verdict=judged("better")))
    registry.register(repository.commit_version("model three", base="base two"))
    registry.register(repository.commit_version("model four"))
    return repository.root


@pytest.fixture(scope="module")
def checked_out(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with checkouts of three versions; none of them was in production yet."""
    root = tmp_path_factory.mktemp("checked_out") / "project"
    shutil.copytree(template, root)
    registry = Registry(root)
    for name in ("v0.0.1", "v0.0.2", "v0.0.4"):
        registry.promote(name)
    for tag in Repository(root).tags():
        if "#" in tag:
            git(root, "tag", "--delete", tag)
    (root / ".models/current").unlink()
    return root


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Repository:
    shutil.copytree(template, tmp_path / "project")
    return Repository(tmp_path / "project")


@pytest.fixture
def ready(checked_out: Path, tmp_path: Path) -> Repository:
    """A repository in which promoting takes no time."""
    shutil.copytree(checked_out, tmp_path / "ready")
    return Repository(tmp_path / "ready")


@pytest.fixture
def registry(repository: Repository) -> Registry:
    return Registry(repository.root)


def names(registry: Registry) -> list[str]:
    return [version.name for version in registry.versions()]


def history(registry: Registry) -> list[str]:
    return [entry.version for entry in registry.history()]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [row.getMessage() for row in caplog.records if row.levelno == logging.WARNING]


def test_without_versions_there_is_nothing_to_have(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    registry = Registry(tmp_path)
    assert registry.versions() == registry.history() == []
    assert registry.promoted() is None
    assert registry.current() is None
    with pytest.raises(RegistryError, match=r"^no version 'v0\.0\.1'; there are: none$"):
        registry.promote("v0.0.1")
    with pytest.raises(RegistryError, match="no version was in production before this one"):
        registry.rollback(None)
    assert not (tmp_path / ".models").exists()


def test_versions_are_numbered_and_hold_what_their_commit_says(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "project")
    registry = Registry(repository.root)
    one = repository.commit_version("one")
    assert registry.at(one) is None
    assert registry.register(one) == "v0.0.1"
    verdict = judged("worse within noise")
    two = repository.commit_version("two", verdict=verdict, decision="refused")
    assert registry.register(two) == "v0.0.2"
    assert [(version.name, version.commit) for version in registry.versions()] == [
        ("v0.0.1", one),
        ("v0.0.2", two),
    ]
    for version in registry.versions():
        assert version.card == repository.card(version.commit)
        assert registry.at(version.commit) == version.name
    assert registry.named("v0.0.2").card.verdict == verdict
    assert registry.named("0.0.2") == registry.named("v0.0.2") == registry.versions()[1]
    assert registry.history() == []
    assert registry.promoted() is None


def test_what_cannot_be_registered_is_one_line(repository: Repository, registry: Registry) -> None:
    before = repository.tags()
    with pytest.raises(RegistryError, match=r"^v0.0.\d+: .* cannot be registered: [^\n]+$"):
        registry.register(registry.named("v0.0.4").commit)
    assert repository.tags() == before


def test_an_unknown_commit_cannot_be_registered(registry: Registry) -> None:
    with pytest.raises(RegistryError, match=r"^v0.0.\d+: .* cannot be registered: [^\n]+$"):
        registry.register("f" * 40)


def test_a_promoted_version_is_checked_out_with_its_base_model_and_card(
    repository: Repository, registry: Registry
) -> None:
    version = registry.promote("v0.0.1")
    assert version == registry.named("v0.0.1")
    assert registry.promoted() == repository.current() == "v0.0.1"
    folder = repository.root / ".models/v0.0.1"
    found = {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "model.json"
    }
    assert found == {
        "weights": "model one",
        "inner/more": "model more",
        "base/weights": "base one",
        "base/inner/more": "base more",
    }
    told = read_json(folder / "model.json")
    assert (told.pop("version"), told.pop("commit")) == ("v0.0.1", version.commit)
    assert version_card_of(told) == version.card
    assert registry.current() == folder
    assert sorted(path.name for path in folder.parent.iterdir()) == ["current", "v0.0.1"]


def test_promoting_leaves_the_checkout_the_index_and_the_branch_alone(
    repository: Repository, registry: Registry
) -> None:
    (repository.root / "mine").write_text("not committed")
    (repository.root / "data/model/weights").unlink()
    before = (
        git(repository.root, "status", "--porcelain"),
        git(repository.root, "rev-parse", "HEAD"),
    )
    registry.promote("v0.0.2")
    after = git(repository.root, "status", "--porcelain"), git(repository.root, "rev-parse", "HEAD")
    assert after == before
    assert not (repository.root / "data/model/weights").exists()


def test_versions_of_one_base_model_share_its_files_and_others_do_not(
    repository: Repository, registry: Registry
) -> None:
    for name in ("v0.0.1", "v0.0.2", "v0.0.3"):
        registry.promote(name)

    def file(version: str, path: str) -> os.stat_result:
        return (repository.root / ".models" / version / path).stat()

    for path in ("base/weights", "base/inner/more"):
        assert file("v0.0.1", path).st_ino == file("v0.0.2", path).st_ino
        assert file("v0.0.1", path).st_nlink >= 2
        assert file("v0.0.3", path).st_ino != file("v0.0.1", path).st_ino
    assert file("v0.0.1", "weights").st_ino != file("v0.0.2", "weights").st_ino
    assert repository.served("base/weights") == "base two"
    shutil.rmtree(repository.root / ".models/v0.0.1")
    assert (repository.root / ".models/v0.0.2/base/weights").read_text() == "base one"


@pytest.mark.parametrize("reason", [errno.EPERM, errno.EXDEV])
def test_the_base_model_is_copied_where_files_cannot_be_linked(
    repository: Repository, registry: Registry, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    registry.promote("v0.0.1")

    def link(source: str, target: str) -> None:
        raise OSError(reason, os.strerror(reason), source, None, target)

    monkeypatch.setattr(os, "link", link)
    registry.promote("v0.0.2")
    files = [repository.root / f".models/{name}/base/weights" for name in ("v0.0.1", "v0.0.2")]
    assert [file.read_text() for file in files] == ["base one", "base one"]
    assert not files[0].samefile(files[1])


def test_the_base_model_is_linked_even_where_the_cache_has_lost_it(
    repository: Repository, registry: Registry
) -> None:
    registry.promote("v0.0.1")
    cached = {
        file: file.read_text()
        for file in (repository.root / ".dvc/cache").rglob("*")
        if file.is_file()
    }
    lost = [file for file, text in cached.items() if text.startswith("base")]
    assert lost
    for file in lost:
        file.unlink()
    registry.promote("v0.0.2")
    assert (repository.served("weights"), repository.served("base/weights")) == (
        "model two",
        "base one",
    )


def test_production_moves_on_and_is_rolled_back_step_by_step(ready: Repository) -> None:
    registry = Registry(ready.root)
    registry.promote("v0.0.1")
    with pytest.raises(RegistryError, match="no version was in production before this one"):
        registry.rollback(None)
    registry.promote("v0.0.2")
    assert (ready.current(), ready.served("weights")) == ("v0.0.2", "model two")
    registry.promote("v0.0.4")
    assert registry.rollback(None).name == registry.promoted() == ready.current() == "v0.0.2"
    assert registry.rollback(None).name == registry.promoted() == ready.current() == "v0.0.1"
    assert ready.served("weights") == "model one"
    with pytest.raises(RegistryError, match="no version was in production before this one"):
        registry.rollback(None)
    assert registry.promoted() == ready.current() == "v0.0.1"
    assert history(registry) == ["v0.0.1", "v0.0.2", "v0.0.4", "v0.0.2", "v0.0.1"]
    # What is promoted after a rollback stands on what was rolled back to.
    registry.promote("v0.0.4")
    assert registry.rollback(None).name == "v0.0.1"


def test_promoting_the_version_in_production_adds_nothing_to_the_history(ready: Repository) -> None:
    registry = Registry(ready.root)
    registry.promote("v0.0.1")
    registry.promote("0.0.1")
    assert history(registry) == ["v0.0.1"]
    assert ready.current() == "v0.0.1"


def test_one_rolls_back_to_any_version_that_was_in_production(ready: Repository) -> None:
    registry = Registry(ready.root)
    for name in ("v0.0.1", "v0.0.2", "v0.0.4"):
        registry.promote(name)
    before = ready.tags()
    with pytest.raises(RegistryError) as caught:
        registry.rollback("v0.0.3")
    assert str(caught.value) == (
        "v0.0.3 was not in production before; there are: v0.0.1, v0.0.2; "
        "`dlplora promote v0.0.3` promotes it"
    )
    with pytest.raises(RegistryError, match=r"^v0\.0\.4 was not in production before; there are: "):
        registry.rollback("v0.0.4")
    with pytest.raises(RegistryError, match=r"^no version 'v9\.0\.0'; there are: v0\.0\.1, v0"):
        registry.rollback("v9.0.0")
    assert ready.tags() == before
    assert registry.rollback("0.0.1").name == ready.current() == "v0.0.1"
    # What was rolled back is still one that was in production, to be named again.
    assert registry.rollback("v0.0.4").name == ready.current() == "v0.0.4"


def test_versions_stand_in_the_order_of_their_numbers(ready: Repository) -> None:
    registry = Registry(ready.root)
    for number in range(5, 12):
        assert registry.register(ready.commit()) == f"v0.0.{number}"
    assert names(registry) == [f"v0.0.{number}" for number in range(1, 12)]


def test_the_newest_assignment_counts_even_within_one_second(ready: Repository) -> None:
    registry = Registry(ready.root)
    for name in ("v0.0.1", "v0.0.2", "v0.0.4"):
        registry.promote(name)
    promoted = ["v0.0.1", "v0.0.2", "v0.0.4"]
    for name in ("v0.0.1", "v0.0.4", "v0.0.2", "v0.0.1", "v0.0.2", "v0.0.4", "v0.0.1", "v0.0.2"):
        registry.promote(name)
        promoted.append(name)
        assert registry.promoted() == ready.current() == name
    assert len(promoted) > 10  # the tenth assignment sorts behind the second, as text
    assert history(registry) == promoted
    times = [entry.time for entry in registry.history()]
    assert len(set(times)) < len(times)
    assert [entry.number for entry in registry.history()] == list(range(1, len(promoted) + 1))


def test_a_foreign_tag_is_left_out_with_a_warning_and_versions_go_on(
    ready: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(ready.root)
    foreign = ready.commit_without_card()
    git(ready.root, "tag", "-a", "model@v0.0.7", "-m", "of another project", foreign)
    assert names(registry) == ["v0.0.1", "v0.0.2", "v0.0.3", "v0.0.4"]
    assert warnings(caplog) == ["model@v0.0.7: no version of this project: no data/model.json"]
    with pytest.raises(RegistryError, match=r"^no version 'v0\.0\.7'; there are: v0\.0\.1, "):
        registry.promote("v0.0.7")
    name = registry.register(ready.commit())
    assert name not in ("v0.0.4", "v0.0.7")
    assert names(registry) == ["v0.0.1", "v0.0.2", "v0.0.3", "v0.0.4", name]
    registry.promote("v0.0.2")
    assert registry.promoted() == ready.current() == "v0.0.2"


def test_a_card_of_another_kind_is_left_out_with_a_warning(
    ready: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(ready.root)
    name = registry.register(ready.commit(card={"created": "yesterday"}))
    assert name == "v0.0.5"
    assert name not in names(registry)
    assert [line.split(":")[0] for line in warnings(caplog)] == ["model@v0.0.5"]
    (ready.root / "data/model.json").write_text("{")
    registry.register(ready.commit())
    assert names(registry) == ["v0.0.1", "v0.0.2", "v0.0.3", "v0.0.4"]


@pytest.mark.parametrize("tag", ["model@latest", "model", "other@v0.0.5", "v0.0.5", "model@v5"])
def test_a_tag_of_another_name_changes_no_version(ready: Repository, tag: str) -> None:
    registry = Registry(ready.root)
    commit = ready.commit()
    for words in ([tag], ["-a", "-m", "more", f"{tag}x"]):
        git(ready.root, "tag", *words, commit)
    assert names(registry) == ["v0.0.1", "v0.0.2", "v0.0.3", "v0.0.4"]
    assert registry.at(commit) is None
    assert registry.register(commit) == "v0.0.5"


@pytest.mark.parametrize("tag", ["model@v0.0.5", "model@v0.0.8"])
def test_a_lightweight_tag_is_no_version_and_versions_go_on(ready: Repository, tag: str) -> None:
    registry = Registry(ready.root)
    commit = ready.commit()
    git(ready.root, "tag", tag, commit)
    assert names(registry) == ["v0.0.1", "v0.0.2", "v0.0.3", "v0.0.4"]
    assert registry.at(commit) is None
    name = registry.register(commit)
    assert names(registry) == ["v0.0.1", "v0.0.2", "v0.0.3", "v0.0.4", name]


def test_a_lightweight_tag_where_a_version_is_renames_it_not(ready: Repository) -> None:
    registry = Registry(ready.root)
    registry.promote("v0.0.1")
    git(ready.root, "tag", "model@v0.0.9", registry.named("v0.0.1").commit)
    assert registry.promoted() == "v0.0.1"


def test_tags_of_what_is_no_commit_are_no_versions(ready: Repository) -> None:
    registry = Registry(ready.root)
    git(ready.root, "tag", "-a", "model@v0.0.9", "-m", "a tree", "HEAD^{tree}")
    git(ready.root, "tag", "-a", "model#production#9", "-m", "a tree", "HEAD^{tree}")
    assert names(registry) == ["v0.0.1", "v0.0.2", "v0.0.3", "v0.0.4"]
    assert registry.promoted() is None


def test_a_foreign_assignment_is_not_what_is_in_production(ready: Repository) -> None:
    registry = Registry(ready.root)
    registry.promote("v0.0.1")
    foreign = ready.commit_without_card()
    git(ready.root, "tag", "-a", "model@v0.0.7", "-m", "of another project", foreign)
    git(ready.root, "tag", "-a", "model#production#9", "-m", "of another one", foreign)
    git(ready.root, "tag", "-a", "model#dev#10", "-m", "another stage", "model@v0.0.2^{}")
    assert registry.promoted() == "v0.0.1"
    assert registry.current() == ready.root / ".models/v0.0.1"


def test_checkouts_are_made_again_where_they_were_deleted(ready: Repository) -> None:
    registry = Registry(ready.root)
    registry.promote("v0.0.1")
    registry.promote("v0.0.2")
    shutil.rmtree(ready.root / ".models")
    tags = ready.tags()
    assert registry.current() == ready.root / ".models/v0.0.2"
    assert (ready.current(), ready.served("weights")) == ("v0.0.2", "model two")
    (ready.root / ".models/current").unlink()
    (ready.root / ".models/current").symlink_to("v0.0.1")
    registry.current()
    assert ready.current() == "v0.0.2"
    (ready.root / ".models/v0.0.2/model.json").unlink()
    registry.current()
    assert (ready.root / ".models/v0.0.2/model.json").is_file()
    assert ready.served("base/weights") == "base one"
    assert ready.tags() == tags


def test_a_checkout_of_another_commit_is_made_again(ready: Repository) -> None:
    registry = Registry(ready.root)
    registry.promote("v0.0.1")
    commit = registry.named("v0.0.2").commit
    for tag in ready.tags():
        git(ready.root, "tag", "--delete", tag)
    assert registry.register(commit) == "v0.0.1"
    registry.promote("v0.0.1")
    assert ready.served("weights") == "model two"


def test_a_checkout_that_was_cut_off_is_made_again(
    repository: Repository, registry: Registry
) -> None:
    folder = repository.root / ".models/v0.0.1"
    folder.mkdir(parents=True)
    (folder / "weights").write_text("half")
    aside = repository.root / ".models/.v0.0.1.999999999.aside"
    aside.mkdir()
    registry.promote("v0.0.1")
    assert repository.served("weights") == "model one"
    assert not aside.exists()


def test_old_checkouts_are_deleted_and_had_again(ready: Repository) -> None:
    registry = Registry(ready.root)
    registry.promote("v0.0.1")
    registry.promote("v0.0.2")
    registry.delete_old()
    assert sorted(path.name for path in (ready.root / ".models").iterdir()) == [
        "current",
        "v0.0.2",
    ]
    assert ready.served("base/weights") == "base one"
    registry.rollback(None)
    assert ready.served("weights") == "model one"


def test_a_version_whose_data_is_in_no_cache_is_one_line_that_names_make_pull(
    repository: Repository, registry: Registry
) -> None:
    registry.promote("v0.0.1")
    shutil.rmtree(repository.root / ".dvc/cache")
    with pytest.raises(RegistryError) as caught:
        registry.promote("v0.0.2")
    message = str(caught.value)
    assert re.match(r"v0\.0\.2: data/model of its commit is not available \(`make pull` ", message)
    assert "\n" not in message
    assert registry.promoted() == repository.current() == "v0.0.1"
    assert history(registry) == ["v0.0.1"]
    assert sorted(path.name for path in (repository.root / ".models").iterdir()) == [
        "current",
        "v0.0.1",
    ]


def test_what_a_remote_has_is_fetched_from_there(
    repository: Repository, registry: Registry, tmp_path: Path
) -> None:
    dvc(repository.root, "remote", "add", "--default", "there", str(tmp_path / "remote"))
    dvc(repository.root, "push", "-q", "--all-tags")
    repository.commit()
    shutil.rmtree(repository.root / ".dvc/cache")
    registry.register(git(repository.root, "rev-parse", "HEAD"))
    registry.promote("v0.0.5")
    assert repository.served("weights") == "model four"


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let git know of no user."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home/.config"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for name in ("AUTHOR", "COMMITTER"):
        for part in ("NAME", "EMAIL"):
            monkeypatch.delenv(f"GIT_{name}_{part}", raising=False)
    monkeypatch.delenv("EMAIL", raising=False)


@pytest.mark.usefixtures("nobody")
def test_git_needs_to_know_no_user(ready: Repository) -> None:
    registry = Registry(ready.root)
    assert registry.register(ready.commit()) == "v0.0.5"
    registry.promote("v0.0.5")
    registry.promote("v0.0.1")
    assert registry.rollback(None).name == registry.promoted() == ready.current() == "v0.0.5"


def test_no_branch_needs_to_be_checked_out(repository: Repository, registry: Registry) -> None:
    git(repository.root, "checkout", "-q", "--detach", "HEAD~2")
    registry.promote("v0.0.4")
    assert repository.served("weights") == "model four"
    assert registry.register(repository.commit()) == "v0.0.5"
    registry.promote("v0.0.5")
    assert repository.served("weights") == "model two"


@pytest.mark.parametrize("dvc_in", ["inner/project", "."])
def test_a_project_may_be_a_folder_of_its_repository(tmp_path: Path, dvc_in: str) -> None:
    repository = make_repository(tmp_path / "top", "inner/project", dvc_in=dvc_in)
    registry = Registry(repository.root)
    for text in ("one", "two"):
        registry.register(repository.commit_version(text))
    assert names(registry) == ["v0.0.1", "v0.0.2"]
    registry.promote("v0.0.1")
    registry.promote("v0.0.2")
    assert (repository.served("weights"), repository.served("base/weights")) == ("two", "base one")
    registry.rollback(None)
    assert repository.served("weights") == "one"
    assert not (tmp_path / "top/.models").exists()


def test_names_of_folders_may_hold_blanks_and_letters_of_any_script(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "mein größtes Projekt")
    registry = Registry(repository.root)
    registry.register(repository.commit_version("one"))
    registry.promote("v0.0.1")
    assert repository.served("weights") == "one"


def test_it_works_from_the_folder_itself(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository.root)
    registry = Registry(Path())
    registry.promote("v0.0.1")
    registry.promote("v0.0.2")
    assert registry.current() == Path(".models/v0.0.2")
    assert repository.served("weights") == "model two"


def test_a_model_in_production_answers_as_the_folder_of_the_pipeline(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "project")
    write_serving_project(repository.root)
    for name in ("base", "model"):
        shutil.copytree(repository.root / f"data/{name}", repository.root / f"source/{name}")
    registry = Registry(repository.root)
    registry.register(repository.commit_made())
    registry.promote("v0.0.1")
    answers = []
    for folder in (".models/current", "data"):
        with Engine.load(repository.root / folder) as engine:
            answers.append(engine.generate(PROMPTS, sampling=Sampling(max_new_tokens=6)))
    assert answers[0] == answers[1]
    assert all(answer.text for answer in answers[0])
