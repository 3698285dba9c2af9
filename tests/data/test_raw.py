"""Raw files: the same rows from every format, and every broken file named."""

import csv
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlplora.data.ingest import Ingested, ingest, validate
from dlplora.data.raw import BLANK, FORMATS, Unreadable, format_of, raw_files
from dlplora.errors import DataError
from dlplora.params.inputs import Splits
from tests.tiny import choices, opposites, write_raw

SPLITS = Splits(train=400, validation=50, test=60, shares=(0.75, 0.10, 0.15), least=(1, 1, 1))
BOM = b"\xef\xbb\xbf"


def _rows(file: Path, content: str | bytes | None = None) -> list[Any]:
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for batch in format_of(file).batches(file) for row in batch]


def _error(file: Path, content: str | bytes | None = None) -> str:
    with pytest.raises(DataError) as caught:
        _rows(file, content)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


def _ingest(file: Path, on_bad_row: Any = "refuse") -> Ingested:
    return ingest(file, "task", keys="auto", on_bad_row=on_bad_row, splits=SPLITS, limit=None)


def _ingest_error(file: Path) -> str:
    with pytest.raises(DataError) as caught:
        _ingest(file)
    return str(caught.value).removeprefix(f"{file}: ")


def _write_lines(file: Path, items: Sequence[Any]) -> None:
    file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def _write_csv(file: Path, items: Sequence[dict[str, Any]], delimiter: str = ",") -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        names = list(dict.fromkeys(name for item in items for name in item))
        writer = csv.DictWriter(stream, names, delimiter=delimiter)
        writer.writeheader()
        for item in items:
            cells = {k: json.dumps(v) if isinstance(v, list) else v for k, v in item.items()}
            writer.writerow(cells)


def _write_tsv(file: Path, items: Sequence[dict[str, Any]]) -> None:
    _write_csv(file, items, delimiter="\t")


def _write_parquet(file: Path, items: Sequence[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(items)), file)


WRITERS: dict[str, Callable[[Path, Sequence[dict[str, Any]]], None]] = {
    ".json": write_raw,
    ".jsonl": _write_lines,
    ".ndjson": _write_lines,
    ".csv": _write_csv,
    ".tsv": _write_tsv,
    ".parquet": _write_parquet,
}
LISTED: list[dict[str, Any]] = [
    {"Q": f"which {place} ?", "A": ["up", "left"] if place % 2 else ["down"]} for place in range(40)
]
ODD: list[dict[str, Any]] = [
    {"Q": f'"{place}", say\r\n é雨 ?\tup', "A": "[not a list]", "bare": 'up, "it"\n'}
    for place in range(40)
]


def test_every_format_has_a_test() -> None:
    assert WRITERS.keys() == FORMATS.keys()


@pytest.mark.parametrize("items", [opposites(60), choices(60), LISTED, ODD])
@pytest.mark.parametrize("ending", FORMATS)
def test_the_same_items_give_the_same_examples_in_every_format(
    tmp_path: Path, ending: str, items: list[dict[str, Any]]
) -> None:
    write_raw(tmp_path / "raw.json", items)
    WRITERS[ending](tmp_path / f"other{ending}", items)
    expected, found = _ingest(tmp_path / "raw.json"), _ingest(tmp_path / f"other{ending}")
    assert found.examples == expected.examples
    assert found.findings.splits == expected.findings.splits


@pytest.mark.parametrize("ending", FORMATS)
def test_rows_come_in_the_order_of_the_file_also_beyond_one_batch(
    tmp_path: Path, ending: str
) -> None:
    items = [{"Q": f"q {place}", "A": str(place)} for place in range(5000)]
    file = tmp_path / f"raw{ending}"
    WRITERS[ending](file, items)
    assert _rows(file) == items


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    "name",
    ["a[1]*?", "[", "**", "a{b,c}", "a'b", 'a"b', "a b", "%20#", "a\\b", "é雨", "a.gz", "json=3"],
)
def test_a_file_name_is_taken_letter_by_letter(tmp_path: Path, name: str, ending: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    file = folder / f"{name}{ending}"
    WRITERS[ending](tmp_path / f"a1xx{ending}", [{"Q": "another", "A": "file"}])
    WRITERS[ending](file, [{"Q": "up", "A": "down"}])
    assert _rows(file) == [{"Q": "up", "A": "down"}]


@pytest.mark.parametrize("ending", FORMATS)
def test_a_tilde_is_no_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path(f"~raw{ending}")
    WRITERS[ending](file, [{"Q": "up", "A": "down"}])
    assert _rows(file) == [{"Q": "up", "A": "down"}]


@pytest.mark.parametrize("ending", FORMATS)
def test_an_ending_may_be_in_capitals(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"RAW{ending.upper()}"
    WRITERS[ending](file, [{"Q": "up", "A": "down"}])
    assert _rows(file) == [{"Q": "up", "A": "down"}]
    assert raw_files(tmp_path) == [file]


@pytest.mark.parametrize("name", ["raw.txt", "raw", "raw.json.gz", ".json"])
def test_an_unknown_ending_is_named_with_the_known_ones(tmp_path: Path, name: str) -> None:
    ending = Path(name).suffix
    assert _error(tmp_path / name, "[]") == (
        f"the ending {ending!r} is none of .csv, .json, .jsonl, .ndjson, .parquet, .tsv"
    )


@pytest.mark.parametrize("ending", FORMATS)
def test_a_folder_an_absent_and_an_empty_file_are_named(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"folder{ending}").mkdir()
    assert _error(tmp_path / f"folder{ending}") == "Is a directory"
    assert _error(tmp_path / f"absent{ending}") == "No such file or directory"
    assert _error(tmp_path / f"empty{ending}", b"") == "the file is empty"


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".ndjson", ".csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_another_unicode_is_refused_with_the_cure(
    tmp_path: Path, ending: str, encoding: str
) -> None:
    file = tmp_path / f"raw{ending}"
    content = '[{"Q": "up", "A": "down"}]'.encode(encoding)
    assert _error(file, content) == (
        "looks like UTF-16 or UTF-32, expected UTF-8; convert it first, "
        "for example by iconv -f UTF-16 -t UTF-8"
    )


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_a_byte_order_mark_changes_nothing(tmp_path: Path, ending: str) -> None:
    plain, marked = tmp_path / f"plain{ending}", tmp_path / f"marked{ending}"
    WRITERS[ending](plain, opposites(40))
    assert _rows(marked, BOM + plain.read_bytes()) == _rows(plain) == opposites(40)


@pytest.mark.parametrize(("ending", "unit"), [(".json", None), (".jsonl", "line"), (".csv", "row")])
def test_nothing_but_a_byte_order_mark_is_an_empty_file(
    tmp_path: Path, ending: str, unit: str | None
) -> None:
    file = tmp_path / f"raw{ending}"
    file.write_bytes(BOM)
    assert _ingest_error(file) == (f"holds no {unit}s" if unit else "the file is empty")


@pytest.mark.parametrize("ending", FORMATS)
def test_a_huge_text_is_read_whole(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"raw{ending}"
    items: list[dict[str, Any]] = [{"Q": "é " * 3_000_000, "A": "down"}, *opposites(3)]
    WRITERS[ending](file, items)
    assert _rows(file) == items


# JSON lists


@pytest.mark.parametrize(
    "content", ["[1]", " \n\t [1] \r\n", "\n" * 300_000 + "[1]" + " " * 300_000]
)
def test_white_space_around_a_list_is_nothing(tmp_path: Path, content: str) -> None:
    assert _rows(tmp_path / "raw.json", content) == [1]


@pytest.mark.parametrize("content", ['[{"Q": "up"},', '[{"Q": "up"}, \n', "[[1], [2],"])
def test_a_list_that_breaks_off_behind_a_comma_is_refused(tmp_path: Path, content: str) -> None:
    assert _error(tmp_path / "raw.json", content) == "not JSON: it ends in ',', expected ']'"


def test_every_list_cut_short_is_refused(tmp_path: Path) -> None:
    content = '[{"Q": "[é]", "A": ["]", ","]}, [1], "\\"]"]'.encode()
    assert _rows(tmp_path / "raw.json", content) == [{"Q": "[é]", "A": ["]", ","]}, [1], '"]']
    for size in range(1, len(content)):
        with pytest.raises(DataError):
            _rows(tmp_path / "raw.json", content[:size])


def test_an_item_too_large_for_a_list_is_refused(tmp_path: Path) -> None:
    content = b'[{"Q": "up"}, {"Q": "' + b"x" * 2**27 + b'"}]'
    assert _error(tmp_path / "raw.json", content) == ("an item is larger than 32 MiB, the most")


@pytest.mark.parametrize("name", ["raw.jsonl", "raw.csv"])
def test_a_line_or_cell_that_never_ends_is_refused(tmp_path: Path, name: str) -> None:
    content = b'"' + b"x" * 2**26
    message = _error(tmp_path / name, content)
    assert ("line 1 is longer than 32 MiB" in message) or ("field larger than" in message)


def test_nesting_as_deep_as_can_be_parsed_is_an_item_and_deeper_is_not(tmp_path: Path) -> None:
    (inner,) = _rows(tmp_path / "raw.json", "[" * 500 + "]" * 500)
    for _ in range(498):
        (inner,) = inner
    assert inner == []
    (bad,) = _rows(tmp_path / "raw.json", "[" * 5000 + "]" * 5000)
    assert bad.problem.startswith("is not JSON: ")


# JSON Lines


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson"])
def test_blank_lines_are_counted_and_are_no_rows(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"raw{ending}"
    assert _rows(file, '\n{"Q": 1}\r\n \t\r\n\n[2]') == [BLANK, {"Q": 1}, BLANK, BLANK, [2]]
    lines = [line for item in opposites(40) for line in (json.dumps(item), "", "  ")]
    file.write_text("\n".join([*lines, "{}", ""]))
    assert _ingest_error(file) == "line 121 has no question and no answer (keys: none)"
    findings = _ingest(file, "skip").findings
    assert (findings.read, findings.distinct, findings.skipped) == (41, 40, 1)
    (problem,) = findings.problems
    assert (problem.file, problem.unit, problem.item) == (str(file), "line", 121)


@pytest.mark.parametrize("content", ["\n", " \n\n\t\n"])
def test_a_file_of_blank_lines_holds_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "raw.jsonl").write_text(content)
    assert _ingest_error(tmp_path / "raw.jsonl") == "holds no lines"


BAD_LINES = [
    b'{"Q": "up", "A": ',
    b'{"Q": "up", "A": NaN}',
    b'{"Q": "up", "A": Infinity}',
    b'{"Q": "up", "A": 1e999}',
    b'{"Q": "\\ud800", "A": "down"}',
    b'{"Q": "\\udc00", "A": "down"}',
    b'{"Q": "\xff", "A": "down"}',
    b'{"Q": "\xed\xa0\x80", "A": "down"}',
    b'{"Q": "a\0b", "A": "down"}',
    b'{"Q": "up", "A": "down"} {"Q": "left", "A": "right"}',
    b'{"Q": "up", "A": "down"},',
    b"{'Q': 'up', 'A': 'down'}",
    b"// up",
    b"up",
    b"[" * 100_000,
    b'{"A": ' * 100_000 + b"1" + b"}" * 100_000,
    BOM + b'{"Q": "up", "A": "down"}',
]


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_line_that_is_not_json_is_named_refused_or_skipped(tmp_path: Path, bad: bytes) -> None:
    lines = [json.dumps(item).encode() for item in opposites(40)]
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(lines))
    file = tmp_path / "raw.jsonl"
    file.write_bytes(b"\n".join([*lines[:16], bad, *lines[16:]]) + b"\n")
    assert _ingest_error(file).startswith("line 17 is not JSON: ")
    (problem,) = validate(file, keys="auto", splits=SPLITS, limit=None).problems
    assert problem.item == 17
    assert problem.problem.startswith("is not JSON: ")
    skipped = _ingest(file, "skip")
    assert skipped.examples == _ingest(tmp_path / "good.jsonl").examples
    assert (skipped.findings.read, skipped.findings.skipped) == (41, 1)


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    item = {"Q": "a\u2028b\u0085c\x0bd", "A": "down"}
    content = json.dumps(item, ensure_ascii=False).replace("\\u000b", "\\u000B")
    assert _rows(tmp_path / "raw.jsonl", content + "\r\n" + content) == [item, item]


def test_json_lines_named_json_are_told_their_name(tmp_path: Path) -> None:
    _write_lines(tmp_path / "raw.json", opposites(2))
    assert _error(tmp_path / "raw.json").endswith("name a file of one object a line .jsonl")


def test_a_list_named_json_lines_is_one_bad_line(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw.jsonl", opposites(40))
    assert _ingest_error(tmp_path / "raw.jsonl") == "line 1 is a list, expected an object"


# CSV


def test_quoted_line_feeds_commas_and_quotes_stay_in_their_cell(tmp_path: Path) -> None:
    content = 'Q,A\r\n"up,\r\nor ""down""?\n",left\r\n\r\n hot , cold \r\n'
    assert _rows(tmp_path / "raw.csv", content) == [
        {"Q": 'up,\r\nor "down"?\n', "A": "left"},
        BLANK,
        {"Q": " hot ", "A": " cold "},
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_csv_may_end_in_any_way(tmp_path: Path, end: str) -> None:
    content = end.join(["", "Q,A", "up,down", "left,right"])
    expected = [{"Q": "up", "A": "down"}, {"Q": "left", "A": "right"}]
    assert _rows(tmp_path / "raw.csv", content) == expected
    assert _rows(tmp_path / "raw.csv", content + end) == expected


def test_a_ragged_row_is_a_bad_row_with_its_line(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "raw.csv", 'Q,A\n"u\np",down\nleft\nhot,cold,3\nbig,small\n')
    expected = "expected the 2 of the header (it ends in line"
    assert rows == [
        {"Q": "u\np", "A": "down"},
        Unreadable(f"has 1 cells, {expected} 4)"),
        Unreadable(f"has 3 cells, {expected} 5)"),
        {"Q": "big", "A": "small"},
    ]


def test_a_ragged_row_is_refused_or_skipped(tmp_path: Path) -> None:
    file = tmp_path / "raw.csv"
    _write_csv(file, opposites(40))
    expected = _ingest(file).examples
    file.write_text(file.read_text() + "up\n")
    assert _ingest_error(file).startswith("row 41 has 1 cells, expected the 2 of the header")
    assert _ingest(file, "skip").examples == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Q,A,Q\nup,down,left\n", "a column stands twice in the header: ['Q', 'A', 'Q']"),
        ('Q,A\n"up,down\n', "line 2: not CSV: unexpected end of data"),
        ('Q,A\n"up"x,down\n', "line 2: not CSV: "),
        (b"Q,A\nup,down\nleft,\xff\n", "not UTF-8: line 3 holds the byte 0xff"),
        (b"Q,A\nup,down\n" + b"left,right\n" * 9999 + b"\xc3", "not UTF-8: line 10002 holds"),
    ],
)
def test_a_file_that_is_no_csv_is_named(
    tmp_path: Path, content: str | bytes, expected: str
) -> None:
    assert _error(tmp_path / "raw.csv", content).startswith(expected)


@pytest.mark.parametrize("content", ["Q,A\n", "Q,A", "\n\r\n", "Q,A\n\n\n"])
def test_a_csv_file_without_rows_holds_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "raw.csv").write_text(content)
    assert _ingest_error(tmp_path / "raw.csv") == "holds no rows"


def test_a_nul_in_a_cell_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "raw.csv"
    _write_csv(file, opposites(40))
    file.write_text(file.read_text() + "u\0p,down\nup,do\0wn\n")
    assert [
        problem.problem
        for problem in validate(file, keys="auto", splits=SPLITS, limit=None).problems
    ] == [
        "has a NUL character in 'Q'",
        "has a NUL character in 'A'",
    ]


def test_an_empty_cell_of_options_is_none(tmp_path: Path) -> None:
    (tmp_path / "raw.csv").write_text(
        "Q,A,options\n" + "".join(f"{row},down,\n" for row in range(40))
    )
    assert _ingest(tmp_path / "raw.csv").findings.kind == "qa"


# Parquet


def test_lists_nulls_and_numbers_of_parquet_come_as_they_are(tmp_path: Path) -> None:
    items: list[dict[str, Any]] = [
        {"Q": "up", "A": ["down", None], "n": 1, "x": 0.5, "options": None},
        {"Q": None, "A": [], "n": None, "x": None, "options": ["up", "down"]},
        {"Q": "[1]", "A": None, "n": 3, "x": float("inf"), "options": []},
    ]
    _write_parquet(tmp_path / "raw.parquet", items)
    assert _rows(tmp_path / "raw.parquet") == items


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"Q": None, "A": ["down"]}, "has null as 'Q', expected text"),
        ({"Q": "up", "A": None}, "has null as 'A', expected text"),
        ({"Q": "up", "A": ["down", None]}, "has null as 'A', expected text"),
        ({"Q": "up", "A": []}, "has an empty list as 'A'"),
    ],
)
def test_a_null_in_parquet_is_a_bad_row(tmp_path: Path, bad: dict[str, Any], problem: str) -> None:
    file = tmp_path / "raw.parquet"
    _write_parquet(file, [*LISTED[:16], bad, *LISTED[16:]])
    assert _ingest_error(file) == f"row 17 {problem}"
    _write_parquet(tmp_path / "good.parquet", LISTED)
    assert _ingest(file, "skip").examples == _ingest(tmp_path / "good.parquet").examples


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([float("nan"), float("nan")]), "null"),
        (pa.array([float("inf"), float("inf")]), "the number inf"),
        (pa.array([b"\xff", b"\xff"]), "bytes that are not UTF-8"),
        (pa.array([1, 2], pa.duration("s")), "a timedelta"),
        (pa.array([{"text": "up"}, {"text": "left"}]), "an object"),
        (pa.nulls(2), "null"),
    ],
)
def test_a_column_that_is_no_text_is_named(tmp_path: Path, column: pa.Array, kind: str) -> None:
    pq.write_table(pa.table({"Q": ["up", "left"], "A": column}), tmp_path / "raw.parquet")
    assert _ingest_error(tmp_path / "raw.parquet").startswith(
        f"row 1 has {kind} as 'A', expected text (and 1 more"
    )


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_strings_of_any_encoding_are_strings(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["up", "left", "up"]).cast(kind)
    pq.write_table(pa.table({"Q": column}), tmp_path / "raw.parquet")
    assert _rows(tmp_path / "raw.parquet") == [{"Q": "up"}, {"Q": "left"}, {"Q": "up"}]


def test_a_parquet_file_without_rows_holds_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"Q": pa.array([], pa.string())}), tmp_path / "raw.parquet")
    assert _ingest_error(tmp_path / "raw.parquet") == "holds no rows"


def test_a_column_that_stands_twice_in_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([["up"], ["left"]], names=["Q", "Q"]), tmp_path / "raw.parquet")
    expected = "a column stands twice in the header: ['Q', 'Q']"
    assert _error(tmp_path / "raw.parquet") == expected


@pytest.mark.parametrize("content", [b"up", b"PAR1PAR1", b"PAR1" + b"x" * 99 + b"PAR1", b"[{}]"])
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    assert _error(tmp_path / "raw.parquet", content).startswith("not Parquet: ")


def test_bytes_of_parquet_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    offsets, texts = pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, texts])
    pq.write_table(pa.table({"Q": column}), tmp_path / "raw.parquet")
    assert _error(tmp_path / "raw.parquet").startswith("not Parquet: 'utf-8' codec can't decode")


@pytest.mark.parametrize("size", [-1, -10, 5000, 100, 4])
def test_a_parquet_file_cut_short_is_named(tmp_path: Path, size: int) -> None:
    _write_parquet(tmp_path / "whole.parquet", opposites(3000))
    content = (tmp_path / "whole.parquet").read_bytes()
    assert _error(tmp_path / "raw.parquet", content[:size]).startswith("not Parquet: ")


def test_a_tampered_parquet_file_is_read_or_named_and_nothing_else(tmp_path: Path) -> None:
    _write_parquet(tmp_path / "whole.parquet", opposites(300))
    content = (tmp_path / "whole.parquet").read_bytes()
    rng = random.Random(0)
    messages = []
    for _ in range(200):
        tampered = bytearray(content)
        for place in rng.sample(range(len(content)), 20):
            tampered[place] = rng.randrange(256)
        (tmp_path / "raw.parquet").write_bytes(tampered)
        try:
            _rows(tmp_path / "raw.parquet")
        except DataError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all("not Parquet: " in text or "stands twice" in text for text in messages)


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_key_that_stands_twice_in_an_object_is_a_bad_row(tmp_path: Path, ending: str) -> None:
    good = '{"Q": "at 3:15 {\\"a\\": 1}", "A": "b\\u003a"}'
    rows = [good, '{"Q": "up", "A": "x", "A": "y"}', '{"Q": "up", "n": {"a": 1, "a": 2}}']
    content = f"[{', '.join(rows)}]" if ending == ".json" else "\n".join(rows)
    found = _rows(tmp_path / f"raw{ending}", content)
    twice = Unreadable("has a key twice in one object")
    assert found == [{"Q": 'at 3:15 {"a": 1}', "A": "b:"}, twice, twice]


@pytest.mark.parametrize("content", ['[{"Q": "up", "A": "down"}]', '{"Q": "up", "A": "down"}\n'])
def test_json_that_is_named_csv_is_told_its_name(tmp_path: Path, content: str) -> None:
    assert _error(tmp_path / "raw.csv", content).startswith("looks like JSON; name it .json")
