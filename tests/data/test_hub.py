"""Data sets read by the library `datasets`: columns by name, labels by name, one-line errors."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from dlplora.data.checksums import data_folder_sha256
from dlplora.data.fetch import fetch
from dlplora.errors import SourceError
from dlplora.params.inputs import DatasetFolder, DatasetMember, HubDataset, Keys

ROWS = [
    {"question": "up", "answer": "down", "choices": ["down", "left"]},
    {"question": "hot, not cold", "answer": "cold", "choices": ["cold", "big"]},
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def _member(split: str = "train", **keys: str | None) -> DatasetMember:
    columns = {"question": "question", "answer": "answer", "options": None, "context": []}
    columns |= keys
    return DatasetMember(config=None, split=split, keys=Keys.model_validate(columns))


def _read(folder: Path, **members: DatasetMember) -> dict[str, list[dict[str, Any]]]:
    has_files = folder.is_dir() and any(folder.iterdir())
    sha256 = data_folder_sha256(folder) if has_files else "0" * 64
    source = DatasetFolder(kind="dataset_folder", path=str(folder), sha256=sha256, members=members)
    told: list[str] = []
    found = fetch(
        source, downloads=folder.parent / "downloads", advance=lambda *, task: told.append(task)
    )
    assert told == list(members)
    return found


def _refusal(folder: Path, member: DatasetMember) -> str:
    with pytest.raises(SourceError) as caught:
        _read(folder, mine=member)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{folder}: ")
    return str(caught.value)


def _write(file: Path, rows: list[dict[str, Any]], features: Any = None) -> None:
    """Write rows by `datasets` itself, in the format that the file's name tells."""
    made = datasets.Dataset.from_list(rows, features=features)
    write = {".jsonl": made.to_json, ".csv": made.to_csv, ".parquet": made.to_parquet}
    write[file.suffix](file)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_become_questions_answers_and_options(folder: Path, suffix: str) -> None:
    _write(folder / f"train{suffix}", ROWS)
    found = _read(folder, mine=_member(options="choices"))
    expected = [
        {"Q": row["question"], "A": row["answer"], "options": row["choices"]} for row in ROWS
    ]
    assert found == {"mine": expected}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_without_options_the_other_columns_are_left_out(folder: Path, suffix: str) -> None:
    _write(folder / f"train{suffix}", [{**row, "choices": "x"} for row in ROWS])
    found = _read(folder, mine=_member())
    assert found == {"mine": [{"Q": row["question"], "A": row["answer"]} for row in ROWS]}


def test_members_may_take_other_splits_and_columns(folder: Path) -> None:
    _write(folder / "train.jsonl", ROWS[:1])
    _write(folder / "test.jsonl", ROWS[1:])
    found = _read(
        folder, there=_member(), back=_member("test", question="answer", answer="question")
    )
    assert found == {
        "there": [{"Q": "up", "A": "down"}],
        "back": [{"Q": "cold", "A": "hot, not cold"}],
    }


def test_answers_may_be_lists(folder: Path) -> None:
    rows = [{"question": "up", "answer": ["down", "below"]}, {"question": "a", "answer": ["b"]}]
    _write(folder / "train.parquet", rows)
    found = _read(folder, mine=_member())
    assert [item["A"] for item in found["mine"]] == [["down", "below"], ["b"]]


def test_labels_are_given_by_name_also_in_lists(folder: Path) -> None:
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features(
        question=datasets.Value("string"), answer=label, choices=datasets.List(label)
    )
    rows = [
        {"question": "a", "answer": 1, "choices": [0, 1]},
        {"question": "b", "answer": 0, "choices": [1, 0]},
    ]
    _write(folder / "train.parquet", rows, features)
    found = _read(folder, mine=_member(options="choices"))
    assert found["mine"] == [
        {"Q": "a", "A": "good", "options": ["bad", "good"]},
        {"Q": "b", "A": "bad", "options": ["good", "bad"]},
    ]


def test_a_row_without_a_label_gets_no_name(folder: Path) -> None:
    features = datasets.Features(
        question=datasets.Value("string"), answer=datasets.ClassLabel(names=["bad", "good"])
    )
    _write(folder / "train.parquet", [{"question": "a", "answer": -1}], features)
    assert _read(folder, mine=_member()) == {"mine": [{"Q": "a", "A": None}]}


def test_a_changed_file_is_read_again(folder: Path) -> None:
    _write(folder / "train.jsonl", ROWS)
    _read(folder, mine=_member())
    _write(folder / "train.jsonl", ROWS[1:])
    assert len(_read(folder, mine=_member())["mine"]) == 1


def test_a_folder_with_other_files_than_those_pinned_is_refused(folder: Path) -> None:
    _write(folder / "train.jsonl", ROWS)
    pinned = data_folder_sha256(folder)
    _write(folder / "train.jsonl", ROWS[1:])
    members = {"mine": _member()}
    source = DatasetFolder(kind="dataset_folder", path=str(folder), sha256=pinned, members=members)
    with pytest.raises(SourceError, match=f"found sha256 .*sources has {pinned}"):
        fetch(source, downloads=folder.parent / "downloads", advance=lambda *, task: None)


def test_an_id_of_the_hub_that_is_a_folder_here_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    members = {"mine": _member()}
    source = HubDataset(kind="hub_dataset", id=folder.name, revision="0" * 40, members=members)
    with pytest.raises(SourceError, match="stands here as a file or folder"):
        fetch(source, downloads=folder.parent / "downloads", advance=lambda *, task: None)


def test_a_missing_column_lists_those_there_are(folder: Path) -> None:
    _write(folder / "train.jsonl", ROWS)
    message = _refusal(folder, _member(answer="label"))
    assert message == f"{folder}: no column 'label'; there are: answer, choices, question"


@pytest.mark.parametrize("split", ["validation", "train["])
def test_an_unknown_split_is_refused(folder: Path, split: str) -> None:
    _write(folder / "train.jsonl", ROWS)
    assert split in _refusal(folder, _member(split))


def test_an_empty_folder_is_refused(folder: Path) -> None:
    assert "found no files; expected a folder of data" in _refusal(folder, _member())


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in _refusal(tmp_path / "absent", _member())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", '{"question": "up", ', "JSON parse error"),
        ("train.parquet", "no Parquet", "Parquet"),
        ("set.py", "raise SystemExit", "scripts are no longer supported"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_with_the_reason(
    folder: Path, capfd: pytest.CaptureFixture[str], name: str, content: str, message: str
) -> None:
    (folder / name).write_text(content)
    assert message in _refusal(folder, _member())
    assert capfd.readouterr() == ("", "")


def test_a_data_set_of_the_hub_that_cannot_be_had_is_one_line_with_advice(tmp_path: Path) -> None:
    source = HubDataset(
        kind="hub_dataset", id="org/set", revision="f" * 40, members={"mine": _member()}
    )
    with pytest.raises(SourceError) as caught:
        fetch(source, downloads=tmp_path, advance=lambda **_: None)
    message = str(caught.value)
    assert message.startswith(
        "org/set at ffffffffffff could not be had from the Hugging Face hub: "
    )
    assert message.endswith("then run the same command again")
    assert "\n" not in message


def test_a_context_stands_in_front_and_may_be_empty(folder: Path) -> None:
    rows = [
        {"title": "T", "text": "It is red.", "question": "Which?", "answer": "red"},
        {"title": None, "text": "It is blue.", "question": "Which?", "answer": "blue"},
    ]
    _write(folder / "train.jsonl", rows)
    found = _read(folder, mine=_member(context=["title", "text"]))["mine"]
    assert [item["Q"] for item in found] == ["T\nIt is red.\nWhich?", "It is blue.\nWhich?"]
    _write(folder / "train.jsonl", [*rows, rows[0] | {"question": ""}])
    message = _refusal(folder, _member(context=["title", "text"]))
    assert message == f"{folder}: row 3 has an empty 'question'"
