"""Columns: what makes the question, and that no column of text is dropped in silence."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dlplora.data.ingest import ingest, validate
from dlplora.data.items import BadRowError, Item, Reader
from dlplora.data.raw import FORMATS, format_of
from dlplora.errors import DataError, SourceError
from dlplora.params.inputs import Keys, Splits

SPLITS = Splits(train=400, validation=50, test=60, shares=(0.75, 0.10, 0.15), least=(1, 1, 1))


def _item(**row: Any) -> Item:
    return Reader("auto", text_cells=False).item(row)


@pytest.mark.parametrize(
    ("row", "question", "answers"),
    [
        ({"instruction": "Reverse", "input": "up", "output": "pu"}, "Reverse\nup", ("pu",)),
        ({"instruction": "Say up", "input": "", "output": "up"}, "Say up", ("up",)),
        ({"instruction": "Say up", "input": None, "response": "up"}, "Say up", ("up",)),
        ({"instruction": "Say up", "output": "up"}, "Say up", ("up",)),
        (
            {"instruction": "Who?", "context": "Ann went.", "response": "Ann"},
            "Who?\nAnn went.",
            ("Ann",),
        ),
        (
            {"question": "Which?", "context": "It is red.", "answer": "red"},
            "It is red.\nWhich?",
            ("red",),
        ),
        ({"passage": "It is red.", "Q": "Which?", "A": "red"}, "It is red.\nWhich?", ("red",)),
        (
            {
                "id": "5733be",
                "title": "Colours",
                "context": "It is red.",
                "question": "Which?",
                "answers": {"text": ["red", "red", "a red"], "answer_start": [6, 6, 4]},
            },
            "Colours\nIt is red.\nWhich?",
            ("a red", "red"),
        ),
        ({"prompt": "Say up", "completion": "up"}, "Say up", ("up",)),
        ({"\ufeffPrompt ": "Say up", "\u00a0RESPONSE": "up"}, "Say up", ("up",)),
        ({"Q": 3, "A": 4.0}, "3", ("4",)),
        ({"context": " ", "Q": "Which?", "A": "red"}, "Which?", ("red",)),
        ({"context": float("nan"), "Q": "Which?", "A": "red"}, "Which?", ("red",)),
        ({"instruction": "Say up", "input": " ", "output": "up"}, "Say up", ("up",)),
    ],
)
def test_known_columns_make_the_question(
    row: dict[str, Any], question: str, answers: tuple[str, ...]
) -> None:
    assert _item(**row)[:2] == (question, answers)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "", "input": "up", "output": "pu"}, "has an empty 'instruction'"),
        ({"instruction": "", "input": "", "output": "pu"}, "has an empty 'instruction'"),
        ({"context": "It is red.", "question": "", "answer": "red"}, "has an empty 'question'"),
        ({"context": {"a": "b"}, "Q": "Which?", "A": "red"}, "has an object as 'context'"),
        ({"Q": "a", "prompt": "b", "A": "c"}, "has more than one question or answer"),
        ({"question": "a", "answer": "b", "answers": ["c"]}, "has more than one question or"),
        ({"context": "a", "answer": "b"}, "has no question"),
    ],
)
def test_a_row_of_known_columns_may_be_bad(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRowError, match=problem):
        _item(**row)


@pytest.mark.parametrize("value", ["a hint", ["a hint"], {"text": "a hint"}, b"a hint"])
def test_a_column_that_carries_text_and_is_not_read_is_named(value: object) -> None:
    reader = Reader("auto", text_cells=False)
    reader.item({"Q": "up", "A": "down", "hint": None})
    reader.item({"Q": "left", "A": "right", "hint": value})
    with pytest.raises(DataError, match=r"^x: 'hint': carries text that would not be used"):
        reader.settled_keys(Path("x"))


@pytest.mark.parametrize(
    "row",
    [
        {"id": "a7"},
        {"question_id": "a7", "GUID": "b"},
        {"hint": ""},
        {"hint": " "},
        {"hint": []},
        {"n": 3, "share": 0.5, "is_new": True},
        {"bare": "up"},
        {"Bare": "up"},
        {"Unnamed: 0": "x"},
    ],
)
def test_identifiers_numbers_and_nothing_carry_no_text(row: dict[str, Any]) -> None:
    reader = Reader("auto", text_cells=False)
    reader.item({"Q": "up", "A": "down"} | row)
    assert reader.settled_keys(Path("x")).question == "Q"


def test_a_bare_question_is_found_in_any_case() -> None:
    assert _item(Q="Which way is up?", A="up", Bare="up?").bare == "up?"


def test_numbers_and_truth_values_in_cells_carry_no_text(tmp_path: Path) -> None:
    rows = [f"{n},Number {n}?,n {n},{n / 2},True" for n in range(40)]
    (tmp_path / "raw.csv").write_text("\n".join([",Q,A,difficulty,is_new", *rows]))
    found = ingest(
        tmp_path / "raw.csv", "task", keys="auto", on_bad_row="refuse", splits=SPLITS, limit=None
    )
    assert found.findings.distinct == 40
    (tmp_path / "raw.csv").write_text("Q,A,difficulty\nup,down,hard\n")
    with pytest.raises(DataError, match="'difficulty': carries text"):
        validate(tmp_path / "raw.csv", keys="auto", splits=SPLITS, limit=None)


def test_named_keys_of_an_instruction_read_as_found_ones_do() -> None:
    row = {"instruction": "Reverse", "input": "up", "output": "pu", "text": "Reverse up: pu"}
    keys = Keys(question="instruction", answer="output", options=None, context=["input"])
    assert Reader(keys, text_cells=False).item(row).question == "Reverse\nup"
    assert Reader(keys, text_cells=False).item(row | {"input": ""}).question == "Reverse"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("raw.tsv", 'Q\tA\tnote, id\nup\t"down"\t3\n'),
        ("raw.csv", '"Q";A\nup;"down"\n'),
        ("raw.csv", 'Q;A;"note, of an id"\nup;down;3\n'),
    ],
)
def test_the_most_frequent_sign_of_the_header_parts_cells(
    tmp_path: Path, name: str, content: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    rows = [row for batch in format_of(file).batches(file) for row in batch]
    assert [(row["Q"], row["A"]) for row in rows] == [("up", "down")]


def test_named_keys_leave_other_columns_out_and_put_the_context_in_front() -> None:
    keys = Keys(question="q", answer="a", options=None, context=["story", "hint"])
    reader = Reader(keys, text_cells=False)
    row = {"q": "Who?", "a": "Ann", "story": "Ann went.", "hint": "", "note": "left out"}
    assert reader.item(row).question == "Ann went.\nWho?"
    assert reader.settled_keys(Path("x")) == keys
    options = Reader(keys.model_copy(update={"options": "choice"}), text_cells=False)
    options.item(row)
    with pytest.raises(DataError, match=r"^x: no 'choice' in any row"):
        options.settled_keys(Path("x"))
    wrong = Reader(keys.model_copy(update={"context": ["tale"]}), text_cells=False)
    wrong.item(row)
    with pytest.raises(DataError, match=r"^x: no 'tale' in any row \(keys: a, hint, note, q, sto"):
        wrong.settled_keys(Path("x"))


@pytest.mark.parametrize("ending", sorted(FORMATS))
def test_instruction_and_input_make_120_questions_in_every_format(
    tmp_path: Path, ending: str
) -> None:
    told = ["Give the opposite of", "Put into upper case", "Spell backwards"]
    rows = [
        {"instruction": told[n % 3], "input": f"word{n // 3}", "output": f"out{n}"}
        for n in range(120)
    ]
    file = tmp_path / f"alpaca{ending}"
    _write(file, rows)
    found = ingest(file, "task", keys="auto", on_bad_row="refuse", splits=SPLITS, limit=None)
    assert found.findings.distinct == 120
    assert found.findings.keys["context"] == ["input"]


def test_powers_and_capitals_make_other_questions(tmp_path: Path) -> None:
    file = tmp_path / "raw.json"
    powers = [
        {"Q": f"How much is {two} plus {n} ?", "A": str(n)}
        for n in range(30)
        for two in ("2²", "22")
    ]
    file.write_text(json.dumps(powers), encoding="utf-8")
    found = ingest(file, "task", keys="auto", on_bad_row="refuse", splits=SPLITS, limit=None)
    assert found.findings.distinct == 60
    letters = [
        {"Q": f"Is {letter}{n} big?", "A": answer, "options": ["yes", "no"]}
        for n in range(30)
        for letter, answer in (("A", "yes"), ("a", "no"))
    ]
    file.write_text(json.dumps(letters), encoding="utf-8")
    assert validate(file, keys="auto", splits=SPLITS, limit=None).is_good


HEADERS = {
    "blank": "Q, A\n{}",
    "no-break space": "Q\u00a0,A\n{}",
    "two marks": "\ufeff\ufeffQ,A\n{}",
    "empty columns": "Q,A,,\n{},,",
    "a comma": "Q,A,\n{},",
    "a comma in rows alone": "Q,A\n{},",
    "semicolons": "Q;A\n{}",
    "tabs": "Q\tA\n{}",
    "empty lines": "\n\nQ,A\n\n{}",
    "rows of empty cells": ",,\nQ,A,\n,,\n{},",
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_a_spreadsheet_writes_is_read(tmp_path: Path, name: str) -> None:
    sign = {"semicolons": ";", "tabs": "\t"}.get(name, ",")
    head, _, row = HEADERS[name].rpartition("{}")[0].rpartition("\n")
    lines = [f"{row}Number {n}?{sign}n {n}{HEADERS[name].rpartition('{}')[2]}" for n in range(40)]
    (tmp_path / "raw.csv").write_text("\n".join([head, *lines]), encoding="utf-8")
    found = ingest(
        tmp_path / "raw.csv", "task", keys="auto", on_bad_row="refuse", splits=SPLITS, limit=None
    )
    rows = {(row.question, row.answers) for part in found.examples.values() for row in part}
    assert rows == {(f"Number {n}?", (f"n {n}",)) for n in range(40)}


def test_a_cell_without_a_column_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "raw.csv"
    file.write_text("Q,A,\nup,down,and more\nleft,right,\n", encoding="utf-8")
    (problem,) = validate(file, keys="auto", splits=SPLITS, limit=None).problems
    assert (problem.item, problem.problem[:11]) == (1, "has 3 cells")


def test_a_pointer_of_git_lfs_is_called_so(tmp_path: Path) -> None:
    for ending in FORMATS:
        file = tmp_path / f"raw{ending}"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(SourceError, match=r"a pointer of Git LFS.*`git lfs pull`"):
            format_of(file)


def test_too_few_items_are_no_good_file_to_validate_either(tmp_path: Path) -> None:
    file = tmp_path / "raw.json"
    file.write_text(json.dumps([{"Q": f"say {n}", "A": "up"} for n in range(20)]))
    splits = SPLITS.model_copy(update={"least": (16, 4, 8)})
    checked = validate(file, keys="auto", splits=splits, limit=None)
    assert (checked.problems, checked.is_good) == ((), False)
    with pytest.raises(DataError) as caught:
        ingest(file, "task", keys="auto", on_bad_row="refuse", splits=splits, limit=None)
    assert str(caught.value) == f"{file}: {checked.whole}"


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix in (".csv", ".tsv"):
        with file.open("w", encoding="utf-8", newline="") as stream:
            sign = "," if file.suffix == ".csv" else "\t"
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=sign)
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
