"""The commands for versions, the inbox and the schedule: words, JSON, and mistakes in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from dlplora import cli
from dlplora.lifecycle.inbox import Arrival
from dlplora.lifecycle.registry import Registry
from dlplora.project.files import Project
from tests.lifecycle.registered import Repository, git, judged, make_repository
from tests.lifecycle.serving import edit, write_serving_project
from tests.project import params
from tests.tiny import choices, opposites, write_raw

KEYS = [
    *("version", "commit", "created", "suite", "system", "score"),
    *("production", "verdict", "decision"),
]
CREATED = "2031-05-06T07:08:09+00:00"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of four versions, all of them checked out and none in production."""
    repository = make_repository(tmp_path_factory.mktemp("template") / "project")
    registry = Registry(repository.root)
    made = [
        ("one", None, "promoted", 0.5),
        ("two", judged("better"), "awaiting approval", 0.625),
        ("three", judged("significantly worse"), "refused", 0.25),
        ("four", judged("cannot judge"), "not promoted", 0.75),
    ]
    for text, verdict, decision, score in made:
        commit = repository.commit_version(
            text,
            verdict=verdict,
            decision=decision,  # type: ignore[arg-type]
            score=score,
        )
        registry.promote(registry.register(commit))
    for tag in repository.tags():
        if "#" in tag:
            git(repository.root, "tag", "--delete", tag)
    (repository.root / ".models/current").unlink()
    return repository.root


@pytest.fixture
def repository(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A copy of it, which this process stands in."""
    shutil.copytree(template, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("COLUMNS", "160")
    return Repository(tmp_path / "project")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process, in an empty folder unless a test goes elsewhere."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["dlplora", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


def mistake(ended: Ended) -> str:
    """Check that a run ended as a user's mistake does; return its line."""
    assert ended.code == 1
    assert ended.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", ended.err)
    return ended.err.removeprefix("error: ").strip()


def good(ended: Ended) -> str:
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def test_without_versions_the_list_is_empty(run: Run) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    assert good(run("models")) == "no model is registered yet; `make retrain` registers one\n"
    assert json.loads(good(run("models", "--json"))) == []


def test_versions_are_listed_as_json_with_the_one_in_production(
    run: Run, repository: Repository
) -> None:
    rows = json.loads(good(run("models", "--json")))
    assert [list(row) for row in rows] == [KEYS] * 4
    assert [row["version"] for row in rows] == ["v0.0.1", "v0.0.2", "v0.0.3", "v0.0.4"]
    assert [row["commit"] for row in rows] == [
        git(repository.root, "rev-parse", f"model@{row['version']}^{{commit}}") for row in rows
    ]
    assert {(row["created"], row["suite"], row["system"]) for row in rows} == {
        (CREATED, "default", "mlp")
    }
    assert [row["score"] for row in rows] == [0.5, 0.625, 0.25, 0.75]
    assert [row["production"] for row in rows] == [False] * 4
    assert [row["verdict"] for row in rows] == [
        *(None, "better", "significantly worse", "cannot judge")
    ]
    assert [row["decision"] for row in rows] == [
        *("promoted", "awaiting approval", "refused", "not promoted")
    ]
    good(run("promote", "v0.0.2"))
    again = json.loads(good(run("models", "--json")))
    assert again == [row | {"production": row["version"] == "v0.0.2"} for row in rows]


def test_versions_are_listed_in_words_with_the_history(run: Run, repository: Repository) -> None:
    for name in ("v0.0.1", "v0.0.2"):
        good(run("promote", name))
    lines = [line.strip() for line in good(run("models")).splitlines()]
    start = lines.index("In production:")
    rows = {line.split()[0]: line for line in lines[:start] if line.startswith("v0.0.")}
    assert list(rows) == ["v0.0.1", "v0.0.2", "v0.0.3", "v0.0.4"]
    states = {
        "v0.0.1": "replaced",
        "v0.0.2": "production",
        "v0.0.3": "refused",
        "v0.0.4": "not promoted",
    }
    for name, state in states.items():
        assert rows[name].rstrip().endswith(state)
        assert "2031-05-06" in rows[name]
        assert "1,200" in rows[name]  # examples that it was trained on
    for name, score in {"v0.0.1": "0.500", "v0.0.2": "0.625"}.items():
        assert score in rows[name]
    assert "better" in rows["v0.0.2"]
    assert "significantly worse" in rows["v0.0.3"]
    told = lines[start + 1 :]
    assert [line.split()[0] for line in told] == ["v0.0.1", "v0.0.2"]
    assert all(re.fullmatch(r"\S+ from \d{4}-\d\d-\d\d \d\d:\d\d:\d\d on", line) for line in told)


def test_what_never_was_in_production_is_listed_as_not_promoted_whatever_the_gate_said(
    run: Run, repository: Repository
) -> None:
    good(run("promote", "v0.0.2"))
    (line,) = (line for line in good(run("models")).splitlines() if "v0.0.1" in line)
    assert line.rstrip().endswith("not promoted")
    assert good(run("models", "show", "v0.0.1")).startswith("v0.0.1, not promoted\n")


def test_a_promoted_version_whose_data_retrains_do_not_use_says_how_to_merge_it(
    run: Run, repository: Repository
) -> None:
    git(repository.root, "branch", "production", "model@v0.0.2^{}")
    assert good(run("promote", "v0.0.1")) == "v0.0.1 is in production: .models/current\n"
    promoted, advice = good(run("promote", "v0.0.3")).splitlines()
    assert promoted == "v0.0.3 is in production: .models/current"
    assert advice == (
        "retrains do not use the data of v0.0.3: the branch production lacks it; "
        "`git merge model@v0.0.3` brings it into your branch and the next retrain"
    )


def test_one_version_is_shown_in_words_and_as_json(run: Run, repository: Repository) -> None:
    out = good(run("models", "show", "v0.0.3"))
    commit = Registry(Path()).named("v0.0.3").commit
    assert out.startswith("v0.0.3, refused\n")
    for told in (CREATED, commit, "suite default", "mlp", "Significantly worse: on 60 test items"):
        assert told in out
    assert "A note." in out
    assert re.search(r"colours +1,200 +8 +60 +aaaaaaaaaaaa", out)
    assert re.search(r"iid +single +0\.750", out)
    row = json.loads(good(run("models", "show", "0.0.3", "--json")))
    assert list(row) == [*KEYS, "card"]
    assert row["card"] == json.loads(git(repository.root, "show", f"{commit}:data/model.json"))
    (listed,) = (r for r in json.loads(run("models", "--json").out) if r["version"] == "v0.0.3")
    assert {key: row[key] for key in KEYS} == listed


def test_the_first_version_is_shown_as_the_first(run: Run, repository: Repository) -> None:
    good(run("promote", "v0.0.1"))
    out = good(run("models", "show", "v0.0.1"))
    assert out.startswith("v0.0.1, in production\n")
    assert "The first version." in out
    row = json.loads(good(run("models", "show", "v0.0.1", "--json")))
    assert (row["production"], row["verdict"]) == (True, None)


def test_versions_are_promoted_and_rolled_back_in_words(run: Run, repository: Repository) -> None:
    assert good(run("promote", "v0.0.1")) == "v0.0.1 is in production: .models/current\n"
    assert good(run("promote", "0.0.3")) == "v0.0.3 is in production: .models/current\n"
    assert repository.served("weights") == "three"
    assert good(run("rollback")) == "v0.0.1 is in production again: .models/current\n"
    assert repository.current() == "v0.0.1"
    assert good(run("rollback", "v0.0.3")) == "v0.0.3 is in production again: .models/current\n"
    assert repository.current() == "v0.0.3"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["models", "show", "v0.0.9"], "no version 'v0.0.9'; there are: v0.0.1, v0.0.2, v0.0.3"),
        (["models", "show", "newest"], "no version 'newest'; there are: v0.0.1"),
        (["models", "show", "v0.0.9", "--json"], "no version 'v0.0.9'"),
        (["promote", "v0.0.9"], "no version 'v0.0.9'; there are: v0.0.1"),
        (["promote", ""], "no version ''; there are: v0.0.1"),
        (["rollback"], "no version was in production before this one"),
        (["rollback", "v0.0.9"], "no version 'v0.0.9'; there are: v0.0.1"),
        (["rollback", "v0.0.2"], "v0.0.2 was not in production before; there are: none; `dlplora "),
    ],
)
def test_a_wrong_version_is_one_line_and_changes_nothing(
    run: Run, repository: Repository, words: list[str], expected: str
) -> None:
    before = repository.tags()
    assert mistake(run(*words)).startswith(expected)
    assert repository.tags() == before
    assert not os.path.lexists(".models/current")


def test_data_that_cannot_be_had_is_one_line(run: Run, repository: Repository) -> None:
    shutil.rmtree(".dvc/cache")
    shutil.rmtree(".models")
    line = mistake(run("promote", "v0.0.2"))
    assert line.startswith("v0.0.2: data/model of its commit is not available (`make pull` fetches")


@pytest.mark.parametrize(
    "words",
    [
        ["models"],
        ["models", "--json"],
        ["models", "show", "v0.0.1"],
        ["promote", "v0.0.1"],
        ["rollback"],
        ["schedule", "on"],
    ],
)
def test_outside_a_repository_a_mistake_is_one_line(run: Run, words: list[str]) -> None:
    assert "git repository" in mistake(run(*words))
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["models", "show"],
        ["models", "delete", "v0.0.1"],
        ["models", "--all"],
        ["promote"],
        ["promote", "v0.0.1", "v0.0.2"],
        ["schedule", "daily"],
        ["inbox", "colours.json"],
    ],
)
def test_wrong_usage_ends_with_two(run: Run, repository: Repository, words: list[str]) -> None:
    before = repository.tags()
    ended = run(*words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("Usage: ")
    assert repository.tags() == before


def test_the_schedule_is_off_until_it_is_switched_on(run: Run) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    for words, expected in (
        (["schedule"], "off"),
        (["schedule", "show"], "off"),
        (["schedule", "on"], "on: "),
        (["schedule", "show"], "on: "),
        (["schedule", "on"], "on: "),
        (["schedule", "off"], "off"),
        (["schedule"], "off"),
    ):
        assert good(run(*words)).startswith(f"the schedule is {expected}"), words
    assert good(run("schedule")) == "the schedule is off\n"


def test_the_schedule_is_of_one_repository_alone(run: Run, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        subprocess.run(["git", "init", "-q"], cwd=tmp_path / name, check=True)
    os.chdir(tmp_path / "one")
    good(run("schedule", "on"))
    os.chdir(tmp_path / "other")
    assert good(run("schedule")) == "the schedule is off\n"


@pytest.fixture
def project(tmp_path: Path) -> None:
    """Make the empty folder a project of two tasks."""
    write_raw(tmp_path / "suites/opposites.json", opposites(70))
    write_raw(tmp_path / "suites/colours.json", choices(70))
    values = params("0" * 64, tmp_path / "base")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    Project(tmp_path).make_raw_folders()


@pytest.mark.usefixtures("project")
def test_an_empty_inbox_is_told(run: Run) -> None:
    assert good(run("inbox")) == "data/inbox is empty\n"
    assert json.loads(good(run("inbox", "--json"))) == []


@pytest.mark.usefixtures("project")
def test_what_a_retrain_would_take_is_shown_and_nothing_is_moved(run: Run) -> None:
    write_raw(Path("data/inbox/colours.json"), choices(10, start=65))
    write_raw(Path("data/inbox/mine.json"), opposites(60))
    Path("data/inbox/ärger.txt").write_text("x")
    before = sorted(Path().rglob("*"))
    lines = good(run("inbox")).splitlines()
    assert lines[:2] == [
        "colours.json: for task colours: 10 rows, 5 new questions",
        "mine.json: a new task: 60 rows, 60 new questions",
    ]
    assert lines[3:] == ["`make retrain` takes the good ones in"]
    out = good(run("inbox", "--json"))
    assert "ärger" in out
    *taken, refused = json.loads(out)
    assert taken == [
        asdict(Arrival("colours.json", "colours", False, 10, 5, None)),
        asdict(Arrival("mine.json", "mine", True, 60, 60, None)),
    ]
    assert list(refused) == ["file", "task", "is_new_task", "num_rows", "num_new", "problem"]
    assert refused["problem"]
    assert lines[2] == f"ärger.txt: would be refused: {refused['problem']}"
    assert sorted(Path().rglob("*")) == before


def test_the_inbox_is_shown_in_a_project_alone(run: Run) -> None:
    write_raw(Path("data/inbox/colours.json"), choices(10))
    assert "run this in the project's folder" in mistake(run("inbox"))


@pytest.mark.parametrize("words", [[], ["--against", "absent"]])
@pytest.mark.usefixtures("project")
def test_what_cannot_be_judged_is_one_line(run: Run, template: Path, words: list[str]) -> None:
    registry = Registry(template)
    promoted = template / f".models/{registry.versions()[0].name}"
    mistake(run("judge", *(words or ["--against", str(promoted)])))


def test_data_is_judged_against_the_model_in_production(run: Run, tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "project")
    write_serving_project(repository.root)
    edit(repository.root / "params.yaml", lambda values: values["answers"].update(max_mib=1))
    for name in ("base", "model"):
        shutil.copytree(repository.root / f"data/{name}", repository.root / f"source/{name}")
    commit = repository.commit_made()
    os.chdir(repository.root)
    line = mistake(run("judge"))
    assert line == "no model is in production yet; `make retrain` registers one"
    registry = Registry(Path())
    registry.promote(registry.register(commit))
    out = Path("verdict.json")
    code_, told, _ = run("judge", "--json", "--out", str(out))
    assert code_ == 0
    found = json.loads(told)
    assert found == json.loads(out.read_text())
    assert (found["against"], found["overall"]["verdict"]) == ("v0.0.1", "within noise")
    assert found["overall"]["difference"] == 0
    assert run("judge").out.startswith("Within noise: on 12 test items of 2 tasks, dlp_mlp scores ")
    by_folder = run("judge", "--json", "--against", str(Path(".models/v0.0.1").resolve())).out
    assert json.loads(by_folder)["against"] == "v0.0.1"
