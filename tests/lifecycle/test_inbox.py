"""The inbox: what files would bring, and what becomes of good and bad ones."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dlplora.errors import DataError
from dlplora.lifecycle.inbox import (
    Arrival,
    check,
    check_task,
    files_in,
    is_taken,
    refuse,
    settled,
    take,
    taken_folder,
    warn_of_links,
)
from dlplora.params.load import load_params
from dlplora.project import own_tasks
from dlplora.project.files import Project
from dlplora.records.files import file_sha256
from tests.project import params
from tests.tiny import choices, opposites, write_raw


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of two tasks with 70 questions each, which this process stands in."""
    write_raw(tmp_path / "suites/opposites.json", opposites(70))
    write_raw(tmp_path / "suites/colours.json", choices(70))
    write_raw(tmp_path / "suites/letters.json", opposites(70, start=900))
    values = params("0" * 64, tmp_path / "base")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    project = Project(Path())
    monkeypatch.chdir(tmp_path)
    project.make_raw_folders()
    Path("data/inbox").mkdir()
    return project


@pytest.fixture
def no_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave DVC out where a test looks at files and params.yaml alone."""
    monkeypatch.setattr(own_tasks, "_dvc", lambda project, *words: None)


@pytest.fixture
def tracked(project: Project) -> Project:
    """The same in a repository where DVC is set up."""
    shutil.copyfile(Path(__file__).parent.parent.parent / ".gitignore", ".gitignore")
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)
    return project


def put(name: str, rows: list[dict[str, object]]) -> Path:
    """Put a JSON file of rows into the inbox."""
    file = Path("data/inbox") / name
    write_raw(file, rows)
    return file


def write(name: str, content: bytes) -> Path:
    file = Path("data/inbox") / name
    file.write_bytes(content)
    return file


def tree() -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in Path().rglob("*")
        if path.is_file() and not {".git", ".dvc", ".scratch"} & set(path.parts)
    }


@pytest.mark.usefixtures("project")
def test_symbolic_links_are_left_out_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    Path("data/inbox/a.json").symlink_to("../../params.yaml")
    Path("data/inbox/b.json").symlink_to("absent")
    Path("data/inbox/taken").symlink_to("../../suites")
    file = write("c.json", b"x")
    assert files_in(Path()) == [file]
    warn_of_links(Path())
    assert [line.partition(":")[0] for line in caplog.messages] == [
        *("data/inbox/a.json", "data/inbox/b.json"),
    ]
    assert caplog.messages[0].endswith("a symbolic link, which is not taken; copy the file itself")


@pytest.mark.usefixtures("project")
def test_files_are_listed_by_name_without_hidden_ones_and_folders() -> None:
    for name in ("b.json", "a.csv", ".hidden.json", ".a.json.swp", "C.txt"):
        write(name, b"x")
    for folder in ("taken", "refused", "folder.json"):
        Path("data/inbox", folder).mkdir()
        Path("data/inbox", folder, "d.json").touch()
    assert files_in(Path()) == [Path("data/inbox") / name for name in ("C.txt", "a.csv", "b.json")]


def test_without_an_inbox_there_are_no_files(tmp_path: Path) -> None:
    assert files_in(tmp_path) == []


def test_files_are_named_from_the_folder_that_this_process_runs_in(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("colours.json", choices(3))
    monkeypatch.chdir(tmp_path / "data")
    assert files_in(tmp_path) == [Path("inbox/colours.json")]


def test_new_questions_of_a_task_are_counted_apart_from_known_ones(project: Project) -> None:
    rows = [*choices(10, start=70), *choices(5), *choices(2, start=70)]
    file = put("colours.json", rows)
    before = tree()
    assert check(project, file) == Arrival("colours.json", "colours", False, 17, 10, None)
    assert tree() == before


def test_a_few_rows_are_enough_for_a_task_that_is_there(project: Project) -> None:
    assert check(project, put("colours.json", choices(1, start=99))).problem is None


@pytest.mark.usefixtures("no_dvc")
def test_a_file_that_was_taken_brings_nothing_new(project: Project) -> None:
    file = put("colours.json", choices(10, start=70))
    take(project, file, file_sha256(file))
    assert check(project, file) == Arrival("colours.json", "colours", False, 10, 0, None)
    other = put("colours.json", choices(12, start=70))
    assert check(project, other) == Arrival("colours.json", "colours", False, 12, 2, None)


def test_a_new_task_is_counted_whole(project: Project) -> None:
    file = put("mine.json", [*opposites(60), *opposites(3)])
    before = tree()
    assert check(project, file) == Arrival("mine.json", "mine", True, 63, 60, None)
    assert tree() == before


@pytest.mark.parametrize("ending", ["json", "jsonl", "ndjson", "csv", "tsv", "JSON"])
def test_every_format_is_taken_to_be_what_its_ending_says(project: Project, ending: str) -> None:
    rows = opposites(60, start=200)
    file = put(f"opposites.{ending}", rows)
    if ending in ("jsonl", "ndjson"):
        file.write_text("".join(f'{{"Q": "{row["Q"]}", "A": "{row["A"]}"}}\n' for row in rows))
    elif ending in ("csv", "tsv"):
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["Q", "A"], delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    found = check(project, file)
    assert (found.problem, found.num_rows, found.num_new) == (None, 60, 60)


GOOD = b'[{"Q": "a ?", "A": "b"}]'
BAD = {
    "empty.json": b"",
    "blank.json": b"  \n",
    "list.json": b"[]",
    "object.json": b'{"Q": "a ?", "A": "b"}',
    "text.json": b"hello",
    "cut.json": GOOD[:-3],
    "comma.json": GOOD[:-1] + b",",
    "strings.json": b'["a", "b"]',
    "utf16.json": GOOD.decode().encode("utf-16"),
    "latin.csv": "Q,A\nä,b\n".encode("latin1"),
    "no_answer.json": b'[{"Q": "a ?"}]',
    "no_question.json": b'[{"A": "a"}]',
    "empty_answer.json": b'[{"Q": "a ?", "A": ""}]',
    "empty_question.json": b'[{"Q": " ", "A": "a"}]',
    "nested.json": b'[{"Q": "a ?", "A": {"b": "c"}}]',
    "twice.csv": b"Q,Q,A\na,b,c\n",
    "cells.csv": b"Q,A\na\n",
    "lines.jsonl": b'{"Q": "a ?", "A": "b"}\n{"Q"\n',
    "json.csv": b'[{"Q": "a ?", "A": "b"}]',
    "parquet.parquet": b"PAR1 and no more",
    "pointer.json": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n",
    "notes.txt": b"remember",
    "noending": b"x",
    "packed.json.gz": b"\x1f\x8b",
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("task", ["opposites", "mine"])
def test_a_bad_file_is_refused_with_its_reason_and_changes_nothing(
    project: Project, name: str, task: str
) -> None:
    ending = name.partition(".")[1] + name.partition(".")[2]
    file = write(f"{task}{ending}", BAD[name])
    before = tree()
    found = check(project, file)
    assert found.problem
    assert "\n" not in found.problem
    assert (found.file, found.num_rows, found.num_new) == (file.name, 0, 0)
    assert found.task == file.stem
    assert found.is_new_task == (file.stem != "opposites")
    assert tree() == before


def test_one_bad_row_among_good_ones_is_named(project: Project) -> None:
    rows = [*choices(20, start=70), {"Q": "a ?", "A": ""}]
    found = check(project, put("colours.json", rows))
    assert found.problem is not None
    assert "data/inbox/colours.json: item 21 has an empty 'A'" in found.problem


def test_a_file_of_another_kind_than_its_task_is_refused(project: Project) -> None:
    assert check(project, put("colours.json", opposites(20, start=70))).problem
    assert check(project, put("opposites.json", choices(20, start=70))).problem


def test_another_answer_to_a_known_question_is_no_new_question(project: Project) -> None:
    row = opposites(1)[0]
    found = check(project, put("opposites.json", [row | {"A": "sideways"}]))
    assert found == Arrival("opposites.json", "opposites", False, 1, 0, None)


def test_too_few_questions_make_no_new_task(project: Project) -> None:
    found = check(project, put("mine.json", opposites(4)))
    assert found.problem is not None
    assert "at least 8 are needed" in found.problem
    assert (found.is_new_task, found.num_rows) == (True, 0)


@pytest.mark.parametrize(
    "name",
    ["1st", "my task", "my-task", "a.b", "übung", "base", "single", "none", "con", "x" * 65, "-x"],
)
def test_a_name_that_can_be_no_task_is_refused(project: Project, name: str) -> None:
    found = check(project, put(f"{name}.json", opposites(60)))
    assert found.problem is not None
    assert "cannot name a task" in found.problem
    assert found.is_new_task


def test_the_name_of_an_unseen_task_is_refused(project: Project) -> None:
    found = check(project, put("letters.json", opposites(60)))
    assert found.problem is not None
    assert "letters: in tasks and in unseen_tasks" in found.problem


def test_raw_data_that_is_not_there_is_no_fault_of_the_file(project: Project) -> None:
    Path("suites/colours.json").unlink()
    file = put("colours.json", choices(60))
    for checked in (lambda: check(project, file), lambda: check_task(project, "colours")):
        with pytest.raises(DataError, match=r"^suites/colours\.json: No such file"):
            checked()
    check_task(project, "opposites")


@pytest.mark.usefixtures("no_dvc")
def test_a_file_is_copied_into_the_folder_of_its_task_under_a_name_of_its_own(
    project: Project,
) -> None:
    text = project.params_file.read_bytes()
    files = [put("colours.json", choices(10, start=70)), put("colours.JSON", choices(9, start=90))]
    csv_file = write("colours.csv", b'Q,A,options\nsay a ?,b,"[""b"", ""c""]"\n')
    for file in (*files, csv_file):
        assert check(project, file).problem is None
        take(project, file, file_sha256(file))
    there = [path for path in Path("data/raw/colours").iterdir() if path.name[0] != "."]
    assert sorted(path.suffix for path in there) == [".csv", ".json", ".json"]
    contents = {path.read_bytes() for path in there}
    assert contents == {file.read_bytes() for file in (*files, csv_file)}
    assert project.params_file.read_bytes() == text
    assert check(project, put("colours.json", choices(30, start=70))).num_new == 11
    take(project, files[1], file_sha256(files[1]))  # again: the same name
    assert len(list(Path("data/raw/colours").glob("[!.]*"))) == 3


@pytest.mark.usefixtures("no_dvc")
def test_a_new_task_is_listed_with_an_adapter_and_the_next_file_is_added_to_it(
    project: Project,
) -> None:
    one, two = put("mine.json", opposites(60)), put("mine.jsonl", [])
    two.write_text('{"Q": "say a ?", "A": "b"}\n')
    assert check(project, one).is_new_task
    take(project, one, file_sha256(one))
    loaded = load_params(project.params_file)
    assert loaded.tasks["mine"].raw == "data/raw/mine"
    assert "mine" in loaded.adapters
    assert check(project, two) == Arrival("mine.jsonl", "mine", False, 1, 1, None)
    take(project, two, file_sha256(two))
    assert sorted(path.suffix for path in Path("data/raw/mine").glob("[!.]*")) == [
        ".json",
        ".jsonl",
    ]
    check_task(project, "mine")


def test_what_is_tracked_is_known_as_taken_under_whatever_name(tracked: Project) -> None:
    known, new = put("colours.json", choices(10, start=70)), put("mine.json", opposites(60))
    assert not is_taken(tracked, known.stem, file_sha256(known))
    assert not is_taken(tracked, new.stem, file_sha256(new))
    take(tracked, known, file_sha256(known))
    take(tracked, new, file_sha256(new))
    for file in (known, new):
        assert is_taken(tracked, file.stem, file_sha256(file))
        (tracker,) = Path("data/raw", file.stem).glob("*.dvc")
        assert tracker.with_suffix("").read_bytes() == file.read_bytes()
    file = known.with_name("colours.jsonl")
    shutil.copyfile(known, file)
    assert is_taken(tracked, file.stem, file_sha256(file))
    assert not is_taken(tracked, "colours", file_sha256(put("colours.json", choices(11, start=70))))
    shutil.copyfile(new, known)  # of another task
    assert not is_taken(tracked, known.stem, file_sha256(known))
    untracked = put("opposites.json", opposites(5, start=300))
    shutil.copyfile(untracked, "data/raw/opposites/left.json")  # by a retrain that was cut off
    assert not is_taken(tracked, untracked.stem, file_sha256(untracked))


def test_a_tracked_file_that_is_not_checked_out_is_none_that_was_taken(project: Project) -> None:
    Path("data/raw/colours/more.json.dvc").write_text("outs:\n- path: more.json\n")
    assert not is_taken(project, "colours", file_sha256(put("colours.json", choices(10, start=70))))


def test_a_refused_file_stands_beside_its_reason(project: Project) -> None:
    file = write("colours.json", b"one")
    target = refuse(file, "it is empty")
    assert target == Path("data/inbox/refused/colours.json")
    assert target.read_bytes() == b"one"
    assert target.with_name("colours.json.reason.txt").read_text() == "it is empty\n"
    assert files_in(Path()) == []


def test_refused_files_of_one_name_are_all_kept_with_their_own_reasons(project: Project) -> None:
    targets = []
    for number in range(4):
        file = write("colours.json", str(number).encode())
        targets.append(refuse(file, f"reason {number}"))
    assert len(set(targets)) == 4
    for number, target in enumerate(targets):
        assert target.suffix == ".json"
        assert target.read_bytes() == str(number).encode()
        reason = target.with_name(f"{target.name}.reason.txt")
        assert reason.read_text() == f"reason {number}\n"
    other = refuse(write("colours.csv", b"x"), "another ending")
    assert other.name == "colours.csv"
    assert len(list(Path("data/inbox/refused").iterdir())) == 10


def test_a_reason_may_be_in_any_script(project: Project) -> None:
    target = refuse(write("überall.json", b"x"), "„ä“ 漢字")
    assert target.with_name("überall.json.reason.txt").read_text(encoding="utf-8") == "„ä“ 漢字\n"


def test_a_reason_replaces_no_refused_file(project: Project) -> None:
    refuse(write("colours.json.reason.txt", b"mine"), "the ending")
    refuse(write("colours.json", b"x"), "it is bad")
    kept = [path.read_bytes() for path in Path("data/inbox/refused").iterdir()]
    assert b"mine" in kept


def test_taken_files_stand_in_a_folder_of_their_time(project: Project) -> None:
    folder = taken_folder(Path())
    assert folder.parent == Path("data/inbox/taken")
    stamp = time.strptime(folder.name, "%Y-%m-%dT%H-%M-%SZ")
    assert abs(time.mktime(stamp) - time.mktime(time.gmtime())) < 60


def test_files_that_were_written_long_ago_are_not_waited_for(project: Project) -> None:
    files = [write(name, b"x") for name in ("b.json", "a.json")]
    for file in files:
        os.utime(file, (time.time() - 60,) * 2)
    start = time.monotonic()
    assert settled(files) == files
    assert time.monotonic() - start < 0.5


def test_a_file_that_is_still_written_is_waited_for(project: Project) -> None:
    file = write("colours.json", b"x")
    assert settled([file]) == [file]
    assert time.time() - file.stat().st_mtime >= 1


def test_a_file_that_is_written_on_and_on_is_left_for_the_next_retrain(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow, ready = write("colours.json", b"x"), write("opposites.json", b"x")
    os.utime(ready, (0, 0))
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        slow.touch()

    monkeypatch.setattr(time, "sleep", sleep)
    assert settled([slow, ready]) == [ready]
    assert 30 < sum(slept) <= 60
    assert caplog.messages == [f"{slow}: still being written; left for the next retrain"]


def test_a_file_that_was_taken_back_is_left_out(project: Project) -> None:
    file, gone = write("colours.json", b"x"), Path("data/inbox/gone.json")
    os.utime(file, (time.time() - 60,) * 2)
    assert settled([gone, file]) == [file]
    assert settled([]) == []


def test_a_file_from_a_clock_that_is_ahead_is_not_waited_for_long(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write("colours.json", b"x")
    os.utime(file, (time.time() + 3600,) * 2)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert sum(slept) < 10

    monkeypatch.setattr(time, "sleep", sleep)
    assert settled([file]) == [file]
