"""Files written whole or not at all."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from dlplora.records.files import (
    atomic_write,
    read_json,
    read_table,
    write_json,
    write_table,
    written_folder,
)

SCHEMA = pa.schema([("name", pa.string()), ("parts", pa.list_(pa.string()))])
ROWS = [{"name": "é", "parts": ["a", ""]}, {"name": "", "parts": []}, {"name": "b", "parts": None}]


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


class StopError(BaseException):
    """As a Ctrl-C in the middle of a block."""


def test_a_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with atomic_write(tmp_path / "a") as aside:
        aside.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
        assert aside.parent == tmp_path  # a rename, not a copy to another disk
    assert _tree(tmp_path) == {"a": b"new"}


def test_missing_folders_above_are_made(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a/b/c") as aside:
        aside.write_text("new")
    assert (tmp_path / "a/b/c").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, StopError])
@pytest.mark.parametrize("started", [True, False])
def test_a_file_stays_as_it_was_when_the_block_raises(
    tmp_path: Path, error: type[BaseException], started: bool
) -> None:
    (tmp_path / "a").write_text("old")

    def write_half() -> None:
        with atomic_write(tmp_path / "a") as aside:
            if started:
                aside.write_text("ne")
            raise error

    with pytest.raises(error):
        write_half()
    assert _tree(tmp_path) == {"a": b"old"}


def test_a_file_that_was_not_there_stays_away_when_the_block_raises(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_write(tmp_path / "a") as aside:
            aside.write_text("ne")
            raise StopError

    with pytest.raises(StopError):
        write_half()
    assert _tree(tmp_path) == {}


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "out/sub").mkdir(parents=True)
    (tmp_path / "out/sub/old").write_text("old")
    (tmp_path / "out/both").write_text("old")
    with written_folder(tmp_path / "out") as aside:
        assert list(aside.iterdir()) == []
        (aside / "both").write_text("new")
        assert (tmp_path / "out/both").read_text() == "old"
    assert _tree(tmp_path) == {"out": None, "out/both": b"new"}


@pytest.mark.parametrize("error", [ValueError, StopError])
def test_a_folder_stays_as_it_was_when_the_block_raises(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")

    def write_half() -> None:
        with written_folder(tmp_path / "out") as aside:
            (aside / "sub").mkdir()
            (aside / "sub/new").write_text("ne")
            raise error

    with pytest.raises(error):
        write_half()
    assert _tree(tmp_path) == {"out": None, "out/old": b"old"}


def test_a_file_may_take_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("old")
    with atomic_write(tmp_path / "out") as aside:
        aside.write_text("new")
    assert _tree(tmp_path) == {"out": b"new"}


def test_what_a_killed_run_left_is_not_taken_over(tmp_path: Path) -> None:
    left = (
        tmp_path / f".out.{os.getpid()}.aside"
    )  # in containers the same process numbers come again
    left.mkdir()
    (left / "stale").write_text("stale")
    with written_folder(tmp_path / "out") as aside:
        (aside / "new").write_text("new")
    assert _tree(tmp_path) == {"out": None, "out/new": b"new"}


def test_json_comes_back_with_its_order_and_letters(tmp_path: Path) -> None:
    value = {"z": 1, "a": [1.5, None, True, "é – 雨"], "m": {"y": {}, "x": []}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert list(read_json(tmp_path / "a.json")) == ["z", "a", "m"]
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "é – 雨" in text
    assert text.endswith("}\n")
    assert json.loads(text) == value


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_json_without_a_number_is_refused_and_the_old_file_kept(
    tmp_path: Path, number: float
) -> None:
    write_json(tmp_path / "a.json", [1])
    before = _tree(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", [number])
    assert _tree(tmp_path) == before


def test_a_table_comes_back_as_it_went(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", ROWS, SCHEMA)
    assert read_table(tmp_path / "a.parquet") == ROWS


def test_a_table_may_have_no_rows(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", [], SCHEMA)
    assert read_table(tmp_path / "a.parquet") == []


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", ROWS, SCHEMA)
    other = [dict(reversed(row.items())) for row in ROWS]  # the schema orders the columns
    write_table(tmp_path / "sub/b.parquet", other, SCHEMA)
    write_table(tmp_path / "c.parquet", ROWS[::-1], SCHEMA)
    first, second, third = (
        (tmp_path / name).read_bytes() for name in ("a.parquet", "sub/b.parquet", "c.parquet")
    )
    assert first == second
    assert first != third
