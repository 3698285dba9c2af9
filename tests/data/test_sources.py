"""Sources: questions built as BIG-bench builds them, pinned archives, nothing half-written."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dlplora.data import sources
from dlplora.data.sources import (
    bigbench_items,
    download_package,
    file_sha256,
    read_bigbench,
    unpack_file,
)
from dlplora.errors import SourceError

FREE = {"name": "opposites", "examples": [{"input": "up", "target": "down"}]}
CHOICE = {
    "name": "colours",
    "examples": [{"input": "grass", "target_scores": {"red": 0, "green": 1, "blue": 0}}],
}


def _one(task: dict[str, Any], **changes: Any) -> dict[str, Any]:
    (item,) = bigbench_items(task | changes)
    return item


def _shown(question: str, options: list[str]) -> list[str]:
    """Return the options in the order in which a question shows them."""
    return sorted(options, key=lambda option: question.index(f"\n  choice: {option}"))


def test_a_free_answer_has_the_usual_prefixes_and_no_choices() -> None:
    assert _one(FREE) == {"Q": "\nQ: up\nA: ", "bare": "up", "A": ["down"]}


@pytest.mark.parametrize(
    ("inputs", "bare"),
    [
        (["Word: up", "Word: left"], ["up", "left"]),
        (["Word: up", "left"], ["Word: up", "left"]),
        (
            ["name: up, near: left", "name: big, near: up"],
            ["name: up, near: left", "name: big, near: up"],
        ),
    ],
)
def test_a_label_before_all_inputs_is_no_part_of_the_bare_question(
    inputs: list[str], bare: list[str]
) -> None:
    examples = [{"input": text, "target": "down"} for text in inputs]
    items = bigbench_items(FREE | {"examples": examples})
    assert [item["bare"] for item in items] == bare
    assert [item["Q"] for item in items] == [f"\nQ: {text}\nA: " for text in inputs]


def test_a_task_may_set_every_prefix() -> None:
    item = _one(
        FREE,
        task_prefix="Say the opposite. ",
        example_input_prefix="Word: ",
        example_output_prefix=" Opposite: ",
        choice_prefix="- ",
    )
    assert item["Q"] == "Say the opposite. Word: up Opposite: "
    assert item["bare"] == "up"


def test_an_empty_prefix_is_kept_empty() -> None:
    item = _one(FREE, example_input_prefix="", example_output_prefix="")
    assert item["Q"] == "up"


def test_a_choice_shows_its_options_between_input_and_output_prefix() -> None:
    item = _one(CHOICE, task_prefix="Look. ")
    shown = "".join(f"\n  choice: {name}" for name in _shown(item["Q"], item["options"]))
    assert item["Q"] == f"Look. \nQ: grass{shown}\nA: "
    assert item["bare"] == "grass"
    assert item["A"] == ["green"]
    assert item["options"] == ["red", "green", "blue"]


def test_a_choice_prefix_of_its_own_stands_before_each_option() -> None:
    item = _one(CHOICE, choice_prefix=" | ")
    assert sorted(item["Q"].removeprefix("\nQ: grass | ").removesuffix("\nA: ").split(" | ")) == [
        "blue",
        "green",
        "red",
    ]


def test_choices_are_not_shown_where_a_task_appends_none() -> None:
    item = _one(CHOICE, append_choices_to_input=False)
    assert item["Q"] == "\nQ: grass\nA: "
    assert item["options"] == ["red", "green", "blue"]
    assert item["A"] == ["green"]


def test_all_options_of_the_highest_score_are_answers() -> None:
    scores = {"red": 0.5, "green": 0.5, "blue": 0.25, "grey": -1}
    item = _one(CHOICE, examples=[{"input": "sky", "target_scores": scores}])
    assert item["A"] == ["red", "green"]
    assert item["options"] == ["red", "green", "blue", "grey"]


def test_a_list_of_targets_is_a_list_of_answers() -> None:
    item = _one(FREE, examples=[{"input": "up", "target": ["down", "below"]}])
    assert item["A"] == ["down", "below"]
    assert "options" not in item


@pytest.mark.parametrize("preferred", ["exact_str_match", "bleu", None])
def test_a_task_with_both_targets_is_a_free_answer_unless_it_prefers_choices(
    preferred: str | None,
) -> None:
    both = [{"input": "up", "target": "down", "target_scores": {"down": 1, "left": 0}}]
    item = _one(FREE, examples=both, preferred_score=preferred)
    assert item == {"Q": "\nQ: up\nA: ", "bare": "up", "A": ["down"]}


def test_a_task_with_both_targets_that_prefers_choices_is_multiple_choice() -> None:
    both = [{"input": "up", "target": "down", "target_scores": {"down": 1, "left": 0}}]
    item = _one(FREE, examples=both, preferred_score="multiple_choice_grade")
    assert item["options"] == ["down", "left"]
    assert item["A"] == ["down"]
    assert "choice: left" in item["Q"]


def test_the_position_of_the_right_choice_varies_over_items() -> None:
    examples = [
        {"input": f"number {place}", "target_scores": {"green": 1, "red": 0, "blue": 0}}
        for place in range(90)
    ]
    items = bigbench_items(CHOICE | {"examples": examples})
    places = Counter(_shown(item["Q"], item["options"]).index("green") for item in items)
    assert set(places) == {0, 1, 2}
    assert min(places.values()) > 15  # 30 are expected, and 15 are more than 3 deviations away


def test_which_choice_is_right_or_listed_first_does_not_move_it() -> None:
    texts = {
        _one(CHOICE, examples=[{"input": "grass", "target_scores": scores}])["Q"]
        for scores in (
            {"red": 0, "green": 1, "blue": 0},
            {"blue": 0, "green": 0, "red": 1},
            {"green": 0, "blue": 1, "red": 0},
        )
    }
    assert len(texts) == 1


def test_every_example_of_a_task_gives_an_item_in_its_order() -> None:
    examples = [{"input": str(place), "target": str(place + 1)} for place in range(20)]
    items = bigbench_items(FREE | {"examples": [*examples, *examples]})
    assert [item["bare"] for item in items] == [str(place) for place in range(20)] * 2


def test_a_task_that_is_no_json_task_is_refused() -> None:
    with pytest.raises(SourceError, match="'programs' of the archive is no JSON task"):
        bigbench_items({"name": "programs"})


def _archive(path: Path, files: dict[str, object]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, value in files.items():
            content = json.dumps(value).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    inside = "toy-1.0/bigbench/benchmark_tasks"
    outside = FREE | {"examples": [{"input": "wrong", "target": "wrong"}]}
    files: dict[str, object] = {
        "toy-1.0/other/opposites/task.json": outside,
        "toy-1.0/opposites/task.json": outside,
        f"{inside}/opposites/sub/task.json": outside,
        f"{inside}/opposites/results.json": outside,
        f"{inside}/opposites/task.json": FREE,
        f"{inside}/group/colours/task.json": CHOICE,
        f"{inside}/programs/task.json": {"name": "programs"},
    }
    return _archive(tmp_path / "toy-1.0.tar.gz", files)


def test_the_wanted_tasks_are_read_and_no_others(archive: Path) -> None:
    before = sorted(archive.parent.rglob("*"))
    advanced: list[dict[str, str]] = []
    found = read_bigbench(
        archive,
        {"mine": "opposites", "yours": "group/colours"},
        advance=lambda **figures: advanced.append(figures),
    )
    assert found == {"mine": bigbench_items(FREE), "yours": bigbench_items(CHOICE)}
    assert advanced == [{"task": "mine"}, {"task": "yours"}]
    assert sorted(archive.parent.rglob("*")) == before  # nothing is unpacked


def test_two_names_may_stand_for_one_task(archive: Path) -> None:
    members = {"mine": "opposites", "again": "opposites"}
    found = read_bigbench(archive, members, advance=lambda **figures: None)
    assert found == dict.fromkeys(members, bigbench_items(FREE))


@pytest.mark.parametrize("folder", ["absent", "colours", "group", "../other/opposites", ""])
def test_a_task_that_is_not_in_the_archive_is_named(archive: Path, folder: str) -> None:
    members = {"mine": "opposites", "yours": folder}
    with pytest.raises(SourceError) as caught:
        read_bigbench(archive, members, advance=lambda **figures: None)
    assert str(caught.value) == f"toy-1.0.tar.gz has no task {folder!r} for 'yours'"


def test_a_folder_without_a_json_task_is_refused(archive: Path) -> None:
    with pytest.raises(SourceError, match="no JSON task"):
        read_bigbench(archive, {"mine": "programs"}, advance=lambda **figures: None)


def test_a_member_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "toy.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("toy/benchmark_tasks/opposites/task.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with pytest.raises(SourceError, match="has no task 'opposites'"):
        read_bigbench(path, {"mine": "opposites"}, advance=lambda **figures: None)


def test_one_file_of_a_wheel_is_written(tmp_path: Path) -> None:
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/model.bin", b"\0weights")
        archive.writestr("toy/readme", b"text")
    unpack_file(wheel, "toy/model.bin", tmp_path / "out.bin")
    assert (tmp_path / "out.bin").read_bytes() == b"\0weights"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "toy.whl"]


def test_a_file_that_is_not_in_the_wheel_is_named_with_those_there_are(tmp_path: Path) -> None:
    wheel = tmp_path / "toy.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy/b", b"")
        archive.writestr("toy/a", b"")
    with pytest.raises(SourceError) as caught:
        unpack_file(wheel, "toy/c", tmp_path / "out.bin")
    assert str(caught.value) == "toy.whl has no file 'toy/c'; it has: toy/a, toy/b"
    assert not (tmp_path / "out.bin").exists()


def test_the_hash_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


GOOD = b"the archive"
SHA256 = hashlib.sha256(GOOD).hexdigest()


class FakePip:
    """Writes the wanted archive, counts its calls, and raises in the middle if told to."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.error = error

    def __call__(self, requirement: str, sha256: str, folder: Path) -> None:
        self.calls.append((requirement, sha256))
        if self.error is not None:
            (folder / "toy-1.0.whl.part").write_bytes(GOOD[:3])
            raise self.error
        (folder / "toy-1.0.whl").write_bytes(GOOD)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(sources, "_pip_download", fake)
    return fake


def _download(downloads: Path) -> Path:
    return download_package("toy", "1.0", sha256=SHA256, downloads=downloads)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_package_is_downloaded_once(tmp_path: Path, pip: FakePip) -> None:
    downloads = tmp_path / "new/downloads"
    first = _download(downloads)
    assert first.read_bytes() == GOOD
    assert pip.calls == [("toy==1.0", SHA256)]
    assert _download(downloads) == first
    assert len(pip.calls) == 1
    assert [path.name for path in downloads.iterdir()] == ["toy-1.0"]


def test_an_archive_that_is_there_is_taken_without_pip(tmp_path: Path, pip: FakePip) -> None:
    (tmp_path / "toy-1.0").mkdir()
    (tmp_path / "toy-1.0/toy-1.0.tar.gz").write_bytes(GOOD)
    assert _download(tmp_path) == tmp_path / "toy-1.0/toy-1.0.tar.gz"
    assert pip.calls == []


@pytest.mark.parametrize(
    "old",
    [
        {},
        {"toy-1.0.whl": GOOD + b"!"},
        {"toy-1.0.whl": b""},
        {"toy-1.0.whl": GOOD, "requirements.txt": b"toy==1.0"},
    ],
)
def test_an_archive_of_another_hash_is_downloaded_again(
    tmp_path: Path, pip: FakePip, old: dict[str, bytes]
) -> None:
    (tmp_path / "toy-1.0").mkdir()
    for name, content in old.items():
        (tmp_path / "toy-1.0" / name).write_bytes(content)
    assert _download(tmp_path).read_bytes() == GOOD
    assert len(pip.calls) == 1
    assert _files(tmp_path) == {"toy-1.0/toy-1.0.whl": GOOD}


def test_another_version_is_another_archive(tmp_path: Path, pip: FakePip) -> None:
    _download(tmp_path)
    download_package("toy", "1.1", sha256=SHA256, downloads=tmp_path)
    assert [requirement for requirement, _ in pip.calls] == ["toy==1.0", "toy==1.1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy-1.0", "toy-1.1"]


@pytest.mark.parametrize("error", [SourceError("no network"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [{}, {"toy-1.0/toy-1.0.whl": b"old"}, {"other-2/o.whl": b"o"}])
def test_a_download_that_breaks_leaves_nothing_half_written(
    tmp_path: Path, pip: FakePip, error: BaseException, old: dict[str, bytes]
) -> None:
    for name, content in old.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    pip.error = error
    with pytest.raises(type(error)):
        _download(tmp_path)
    assert _files(tmp_path) == old
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    pip.error = None
    assert _download(tmp_path).read_bytes() == GOOD


def test_a_folder_that_a_killed_download_left_is_no_obstacle(tmp_path: Path, pip: FakePip) -> None:
    killed = subprocess.Popen(["true"])
    killed.wait()
    left = tmp_path / f".toy-1.0.{killed.pid}.aside"
    left.mkdir()
    (left / "toy-1.0.whl.part").write_bytes(b"part")
    _download(tmp_path)
    assert _files(tmp_path) == {"toy-1.0/toy-1.0.whl": GOOD}


def test_pip_is_asked_for_the_hash_and_its_failure_is_one_line_of_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        asked.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(SourceError, match=r"could not download toy==1\.0.*same command") as caught:
        _download(tmp_path)
    assert "\n" not in str(caught.value)
    ((command, requirements),) = asked
    assert requirements == f"toy==1.0 --hash=sha256:{SHA256}\n"
    assert {"download", "--no-deps", "--require-hashes"} <= set(command)
    assert list(tmp_path.iterdir()) == []
