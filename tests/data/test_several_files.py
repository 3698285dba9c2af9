"""A task of several raw files: what one file with all their rows would give, and who is named."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlplora.data.ingest import Ingested, ingest, validate
from dlplora.data.raw import raw_files
from dlplora.errors import DataError
from dlplora.params.inputs import Keys, Splits
from dlplora.records.findings import Problem
from tests.tiny import choices, opposites, write_raw

SHARES = (0.75, 0.10, 0.15)
SMALL = Splits(train=400, validation=50, test=60, shares=SHARES, least=(1, 1, 1))
TIGHT = Splits(train=12, validation=3, test=4, shares=SHARES, least=(1, 1, 1))
Rows = Sequence[dict[str, Any]]


def _ingest(
    *raws: Path,
    keys: Literal["auto"] | Keys = "auto",
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    splits: Splits = SMALL,
) -> Ingested:
    raw, *more = raws
    return ingest(
        raw, "task", keys=keys, on_bad_row=on_bad_row, splits=splits, limit=None, more=more
    )


def _error(*raws: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        _ingest(*raws, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _write_csv(file: Path, items: Rows) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(items[0])
        for item in items:
            cells = (json.dumps(v) if isinstance(v, list) else v for v in item.values())
            writer.writerow(cells)


def _write_lines(file: Path, items: Sequence[Any]) -> None:
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def _write_parquet(file: Path, items: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(list(items)), file)


WRITERS: dict[str, Callable[[Path, Any], None]] = {
    ".json": write_raw,
    ".csv": _write_csv,
    ".jsonl": _write_lines,
    ".parquet": _write_parquet,
}


def _renamed(items: Rows) -> list[dict[str, Any]]:
    return [{"question": row["Q"], "answer": row["A"]} for row in items]


def _counts(ingested: Ingested) -> Any:
    """Return the findings but for what tells of places."""
    return replace(ingested.findings, files=(), problems=())


@pytest.mark.parametrize("splits", [SMALL, TIGHT])
@pytest.mark.parametrize("items", [opposites(70), choices(70)])
@pytest.mark.parametrize("endings", [(".json", ".json"), tuple(WRITERS), (".parquet", ".csv")])
def test_files_give_what_one_file_with_all_their_rows_gives_in_any_order(
    tmp_path: Path, endings: tuple[str, ...], items: Rows, splits: Splits
) -> None:
    write_raw(tmp_path / "whole.json", items)
    expected = _ingest(tmp_path / "whole.json", splits=splits)
    folder = tmp_path / "parts"
    folder.mkdir()
    files = []
    for place, ending in enumerate(endings):
        files.append(folder / f"{place}{ending}")
        WRITERS[ending](files[-1], items[place :: len(endings)])
    for raws in (files, files[::-1], [folder], [files[-1], folder]):
        ingested = _ingest(*raws, splits=splits)
        assert ingested.examples == expected.examples
        assert _counts(ingested) == _counts(expected)
        assert sorted(ingested.findings.files) == sorted(map(str, files))


questions = st.sampled_from(["up ?", " up\t?", "left ?", "hot ?", "which way ?"]) | st.text(
    "ab é", min_size=1, max_size=3
)
good_rows = st.fixed_dictionaries(
    {"Q": questions, "A": st.sampled_from(["down", "right", ["cold", "down"]])}
)
choice_rows = st.fixed_dictionaries(
    {
        "Q": questions,
        "A": st.sampled_from(["red", "green"]),
        "options": st.permutations(["red", "green"]) | st.just(["red", "green", "blue"]),
    }
)
bad_rows: st.SearchStrategy[Any] = st.sampled_from(["up", 3, None, [], {}, {"Q": "up", "A": ""}])
more_free = st.lists(good_rows | bad_rows, max_size=12).map(lambda rows: opposites(30) + rows)
more_choices = st.lists(choice_rows | bad_rows, max_size=12).map(lambda rows: choices(30) + rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


@settings(max_examples=60, deadline=None)
@given(rows=more_free | more_choices, data=st.data(), splits=st.sampled_from([SMALL, TIGHT]))
def test_any_rows_may_be_dealt_to_files_in_any_way(
    folder: Path, rows: list[Any], data: st.DataObject, splits: Splits
) -> None:
    parts: list[list[Any]] = [[{"Q": "say a ?", "A": "a"}], [{"Q": "say b ?", "A": "b"}]]
    if "options" in rows[0]:
        parts = [[row | {"options": ["a", "b"]} for row in part] for part in parts]
    rows = [*rows, *parts[0], *parts[1]]  # each file has a row that names its fields
    places = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    for row, place in zip(rows[:-2], places, strict=False):
        parts[place].append(row)
    files = [folder / "a.jsonl", folder / "b.json"]
    _write_lines(files[0], parts[0])
    write_raw(files[1], parts[1])
    _write_lines(folder / "whole.jsonl", rows)
    expected = _ingest(folder / "whole.jsonl", on_bad_row="skip", splits=splits)
    for raws in (files, files[::-1]):
        ingested = _ingest(*raws, on_bad_row="skip", splits=splits)
        assert ingested.examples == expected.examples
        assert _counts(ingested) == _counts(expected)
        bad = [
            parts[files.index(Path(row.file))][row.item - 1] for row in ingested.findings.problems
        ]
        wanted = [rows[row.item - 1] for row in expected.findings.problems]
        assert sorted(map(json.dumps, bad)) == sorted(map(json.dumps, wanted))
        assert {(row.file, row.unit) for row in ingested.findings.problems} <= {
            (str(files[0]), "line"),
            (str(files[1]), "item"),
        }


def test_a_file_that_is_named_twice_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "task"
    write_raw(folder / "a.json", opposites(40))
    write_raw(folder / "b.json", opposites(20, start=40))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    expected = _ingest(folder)
    assert expected.findings.read == 60
    for more in ([folder], [folder / "a.json"], [Path("task/b.json"), Path("link")]):
        again = _ingest(folder, *more)
        assert again.examples == expected.examples
        assert _counts(again) == _counts(expected)
    assert raw_files(folder / "a.json", folder, tmp_path / "link") == [
        folder / "a.json",
        folder / "b.json",
    ]
    assert _ingest(folder / "b.json", folder).examples == expected.examples


def test_the_files_are_those_that_were_named_and_then_those_of_folders_by_name(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "task"
    for name in ("b.json", "a.json", "c.json"):
        write_raw(folder / name, opposites(10))
    named = folder / "b.json"
    assert raw_files(named, folder) == [named, folder / "a.json", folder / "c.json"]


def test_an_empty_folder_beside_a_file_changes_nothing(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw.json", opposites(40))
    expected = _ingest(tmp_path / "raw.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".gitkeep").touch()
    (empty / "notes.txt").write_text("where they come from")
    assert _ingest(tmp_path / "raw.json", empty) == expected
    assert _ingest(empty, tmp_path / "raw.json") == expected
    assert _error(empty, empty).startswith(f"{empty}, {empty}: found no file of questions and ans")


@pytest.mark.parametrize("bad_in", [0, 1])
def test_a_bad_row_is_named_with_its_file_what_its_format_calls_it_and_its_number(
    tmp_path: Path, bad_in: int
) -> None:
    parts: list[list[Any]] = [opposites(25), opposites(25, start=25)]
    files = [tmp_path / "a.jsonl", tmp_path / "b.json"]
    for file, part in zip(files, parts, strict=True):
        WRITERS[file.suffix](file, part)
    expected = _ingest(*files)
    parts[bad_in].insert(6, {"Q": "up", "A": ""})
    WRITERS[files[bad_in].suffix](files[bad_in], parts[bad_in])
    unit = ("line", "item")[bad_in]
    assert _error(*files) == f"{files[bad_in]}: {unit} 7 has an empty 'A'"
    skipped = _ingest(*files, on_bad_row="skip")
    assert skipped.examples == expected.examples
    (problem,) = skipped.findings.problems
    assert problem == Problem(str(files[bad_in]), unit, 7, "has an empty 'A'")
    assert str(problem) == _error(*files)
    assert (skipped.findings.read, skipped.findings.skipped) == (51, 1)


def test_bad_rows_come_file_by_file_and_blank_lines_count_as_lines(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.json", [*opposites(30), {"Q": "", "A": "x"}, {"Q": "up", "A": {}}])
    (tmp_path / "b.jsonl").write_text('\n\n{"Q": "say a ?", "A": "a"}\n\n{"Q": "up"}\nup\n')
    (tmp_path / "c.csv").write_text("Q,A\nsay b ?,b\n\nleft\n")
    found = [str(row) for row in validate(tmp_path, keys="auto", splits=SMALL, limit=None).problems]
    expected = [
        f"{tmp_path}/a.json: item 31 has an empty 'Q'",
        f"{tmp_path}/a.json: item 32 has an object as 'A', expected text",
        f"{tmp_path}/b.jsonl: line 5 has no answer (keys: Q)",
        f"{tmp_path}/b.jsonl: line 6 is not JSON: ",
        f"{tmp_path}/c.csv: row 3 has 1 cells, expected the 2 of the header (it ends in line 4)",
    ]
    assert len(found) == len(expected)
    for told, beginning in zip(found, expected, strict=True):
        assert told.startswith(beginning)
    findings = _ingest(tmp_path, on_bad_row="skip").findings
    assert [str(problem) for problem in findings.problems] == found
    assert (findings.read, findings.distinct, findings.skipped) == (37, 32, 5)
    assert _error(tmp_path) == f"{found[0]} (and 4 more)"


@pytest.mark.parametrize(("units", "ending"), [(("item", "item"), ".json"), (("item", "row"), "")])
def test_a_contradiction_across_files_names_both(
    tmp_path: Path, units: tuple[str, str], ending: str
) -> None:
    one, other = tmp_path / "a.json", tmp_path / f"b{ending or '.csv'}"
    write_raw(one, choices(20))
    WRITERS[other.suffix](other, choices(20, start=20))
    expected = _ingest(one, other)
    asked = {"Q": "which?", "A": "red", "options": ["red", "green"]}
    write_raw(one, [*choices(20), asked])
    WRITERS[other.suffix](other, [asked | {"A": "green"}, *choices(20, start=20)])
    said = "same question, other answers"
    problems = (
        Problem(str(one), units[0], 21, f"contradicts {units[1]} 1 of {other}: {said}"),
        Problem(str(other), units[1], 1, f"contradicts {units[0]} 21 of {one}: {said}"),
    )
    assert _error(one, other).startswith(f"{problems[0]} (and 1 more")
    skipped = _ingest(one, other, on_bad_row="skip")
    assert skipped.examples == expected.examples
    assert skipped.findings.problems == problems
    assert validate(one, keys="auto", splits=SMALL, limit=None).problems == ()
    assert validate(tmp_path, keys="auto", splits=SMALL, limit=None).problems == problems


def test_a_contradiction_within_the_second_file_names_no_other(tmp_path: Path) -> None:
    asked = {"Q": "which?", "A": "red", "options": ["red", "green"]}
    write_raw(tmp_path / "a.json", choices(20))
    write_raw(tmp_path / "b.json", [asked, *choices(20, start=20), asked | {"A": "green"}])
    assert _error(tmp_path).startswith(
        f"{tmp_path}/b.json: item 1 contradicts item 22: same question, other answers (and 1 more"
    )


@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
@pytest.mark.parametrize("qa_first", [False, True])
def test_both_kinds_in_two_files_are_refused_and_both_are_named(
    tmp_path: Path, qa_first: bool, on_bad_row: str
) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.jsonl"]
    parts = [opposites(20), choices(20)] if qa_first else [choices(20), opposites(20)]
    write_raw(files[0], parts[0])
    _write_lines(files[1], parts[1])
    places = [("item", files[0]), ("line", files[1])]
    (mcq, mcq_file), (qa, qa_file) = places[::-1] if qa_first else places
    assert _error(*files, on_bad_row=on_bad_row) == (
        f"{mcq_file}: {mcq} 1 has options and {qa} 1 of {qa_file} has none; "
        "a task is either multiple choice or free answers: make two tasks"
    )


def test_each_file_may_name_its_fields_in_its_own_way(tmp_path: Path) -> None:
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    write_raw(tmp_path / "whole.json", opposites(60))
    expected = _ingest(tmp_path / "whole.json")
    write_raw(one, opposites(30))
    write_raw(other, _renamed(opposites(30, start=30)))
    assert _ingest(one, other).examples == expected.examples
    assert _ingest(one, other).findings.keys == {"question": "Q", "answer": "A"}
    turned = _ingest(other, one)
    assert turned.examples == expected.examples
    assert turned.findings.keys == {"question": "question", "answer": "answer"}


def test_within_one_file_there_is_still_one_naming(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.json", opposites(30))
    mixed = [*opposites(20, start=30), *_renamed(opposites(20, start=50))]
    write_raw(tmp_path / "b.json", mixed)
    assert _error(tmp_path).startswith(
        f"{tmp_path}/b.json: found the keys Q, A, question, answer; expected the same in all rows"
    )


def test_names_that_are_given_hold_for_every_file(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.json", opposites(30))
    write_raw(tmp_path / "b.json", _renamed(opposites(20, start=30)))
    keys = Keys(question="Q", answer="A", options=None, context=[])
    expected = f"{tmp_path}/b.json: item 1 has no 'Q' (keys: question, answer)"
    assert _error(tmp_path, keys=keys).startswith(expected)


def test_a_column_that_nobody_reads_is_named_with_its_file(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.json", opposites(30))
    write_raw(tmp_path / "b.json", [row | {"hint": "x"} for row in opposites(30, start=30)])
    assert _error(tmp_path).startswith(f"{tmp_path}/b.json: ")
    assert "'hint': carries text" in _error(tmp_path)


@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("b.json", "", "the file is empty"),
        ("b.json", "[]", "holds no items"),
        ("b.jsonl", "\n \n", "holds no lines"),
        ("b.csv", "Q,A\n", "holds no rows"),
        ("b.parquet", "up", "not Parquet: "),
        ("b.json", '{"Q": "up"}', "found an object, expected a list"),
        ("b.json", '["up", "down"]', "item 1 is text, expected an object"),
        ("b.jsonl", "\n3\n4\n", "line 2 is a number, expected an object"),
        ("b.json", '[{"Q": "up"}, {"Q": "down"}]', "found the keys Q; expected the same"),
        ("b.json", '[{"text": "up", "label": "down"}]', "found the keys text, label; expected"),
    ],
)
def test_a_second_file_without_a_good_row_is_named(
    tmp_path: Path, name: str, content: str, expected: str, on_bad_row: str
) -> None:
    write_raw(tmp_path / "a.json", opposites(40))
    (tmp_path / name).write_text(content)
    message = _error(tmp_path, on_bad_row=on_bad_row)
    assert message.startswith(f"{tmp_path / name}: {expected}")


def test_a_second_file_of_no_objects_is_named_by_its_first_row_behind_many_bad_ones(
    tmp_path: Path,
) -> None:
    write_raw(tmp_path / "a.json", [*opposites(40), *[{"Q": "up", "A": ""}] * 300])
    (tmp_path / "b.json").write_text('["up", "down"]')
    assert _error(tmp_path, on_bad_row="skip") == (
        f"{tmp_path}/b.json: item 1 is text, expected an object"
    )


def test_a_second_file_of_only_bad_rows_is_refused_or_skipped(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.json", opposites(40))
    expected = _ingest(tmp_path / "a.json")
    write_raw(tmp_path / "b.json", [{"Q": "up", "A": ""}] * 3)
    told = f"{tmp_path}/b.json: item 1 has an empty 'A'"
    assert _error(tmp_path) == f"{told} (and 2 more)"
    skipped = _ingest(tmp_path, on_bad_row="skip")
    assert skipped.examples == expected.examples
    assert {(row.file, row.item) for row in skipped.findings.problems} == {
        (str(tmp_path / "b.json"), number) for number in (1, 2, 3)
    }


def test_only_bad_rows_in_every_file_are_too_few_and_all_files_are_named(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        write_raw(file, [{"Q": "", "A": "x"}] * 20)
    assert _error(*files, on_bad_row="skip") == (
        f"{files[0]}, {files[1]}: all 40 rows are bad, the first: item 1 has an empty 'Q'"
    )


def test_too_few_items_count_those_of_all_files(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.json", opposites(6))
    write_raw(tmp_path / "b.json", opposites(6, start=3))
    splits = Splits(train=400, validation=50, test=60, shares=SHARES, least=(16, 1, 1))
    message = _error(tmp_path, splits=splits)
    assert message.startswith(f"{tmp_path}/a.json, {tmp_path}/b.json: ")
    assert " of 9 distinct questions fell into the train split, at least 16" in message


def test_a_file_that_dvc_tracks_and_that_is_not_here_is_refused_with_advice(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.json", opposites(40))
    tracker = tmp_path / "b.json.dvc"
    tracker.write_text("outs:\n- path: b.json\n")
    for raws in ([tmp_path], [tmp_path / "a.json", tmp_path]):
        assert _error(*raws) == (
            f"{tracker}: its file is not here; `dvc pull {tracker}` fetches it"
        )
    write_raw(tmp_path / "b.json", opposites(20, start=40))
    assert _ingest(tmp_path).findings.read == 60


@pytest.mark.parametrize("name", ["absent.json", "b.txt", "b.json"])
def test_a_second_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    write_raw(tmp_path / "a.json", opposites(40))
    other = tmp_path / name
    if name == "b.json":
        other.write_text("[1")
    assert _error(tmp_path / "a.json", other).startswith(f"{other}: ")


def test_the_files_are_never_changed(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.json", [*opposites(40), {"Q": "", "A": ""}])
    write_raw(tmp_path / "b.json", opposites(20))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    _ingest(tmp_path, on_bad_row="skip")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
