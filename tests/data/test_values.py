"""Values of rows: one reading for each type, the same from every source."""

import datetime
import decimal
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlplora.data.checksums import data_folder_sha256
from dlplora.data.hub import read_datasets
from dlplora.data.items import Reader
from dlplora.data.raw import format_of
from dlplora.data.values import UnreadableValueError, value_to_text
from dlplora.params.inputs import DatasetFolder, DatasetMember, Keys

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("up", "up"),
        ("nan", "nan"),  # a word: bread
        ("", ""),
        (None, None),
        (NAN, None),
        (pd.NaT, None),
        (decimal.Decimal("NaN"), None),
        (3, "3"),
        (3.0, "3"),
        (-2.0, "-2"),
        (2.0**53 - 1, "9007199254740991"),
        (2**70, str(2**70)),
        (0.5, "0.5"),
        (0.1, "0.1"),
        (decimal.Decimal("1.50"), "1.50"),
        (decimal.Decimal("7"), "7"),
        (True, "true"),
        (False, "false"),
        (datetime.date(2024, 7, 26), "2024-07-26"),
        (datetime.datetime(2024, 7, 26, 9, 5), "2024-07-26T09:05:00"),
        (datetime.time(9, 5), "09:05:00"),
        ("Straße".encode(), "Straße"),
    ],
)
def test_each_type_has_one_reading(value: object, text: str | None) -> None:
    assert value_to_text(value) == text


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (float("inf"), "the number inf"),
        (1e20, "a whole number too large to be read exactly without quotes"),
        (b"\xff", "bytes that are not UTF-8"),
        ({"up": 1}, "an object"),
        (["up"], "a list"),
        (datetime.timedelta(1), "a timedelta"),
        (2 + 1j, "a complex"),
    ],
)
def test_what_has_no_reading_is_named(value: object, found: str) -> None:
    with pytest.raises(UnreadableValueError, match=f"^{found}$"):
        value_to_text(value)


COLUMNS: list[tuple[pa.Array, list[str]]] = [
    (pa.array([1, 2]), ["1", "2"]),
    (pa.array([1.0, 2.5]), ["1", "2.5"]),
    (pa.array([True, False]), ["true", "false"]),
    (pa.array([b"up", b"down"]), ["up", "down"]),
    (pa.array(["up", "down"]).dictionary_encode(), ["up", "down"]),
    (pa.array([19930, 19931], pa.date32()), ["2024-07-26", "2024-07-27"]),
    (
        pa.array([datetime.datetime(2024, 7, 26), datetime.datetime(2024, 7, 26, 1)]),
        ["2024-07-26T00:00:00", "2024-07-26T01:00:00"],
    ),
]


@pytest.mark.parametrize(("column", "texts"), COLUMNS)
def test_parquet_and_datasets_read_a_column_alike(
    tmp_path: Path, column: pa.Array, texts: list[str]
) -> None:
    file = tmp_path / "data" / "train.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({"Q": ["a", "b"], "A": column}), file)
    reader = Reader("auto", text_cells=False)
    rows = [reader.item(row) for batch in format_of(file).batches(file) for row in batch]
    assert [row.answers for row in rows] == [(text,) for text in texts]
    assert [item["A"] for item in _by_datasets(file.parent, tmp_path)] == texts


def test_a_missing_value_is_missing_and_never_a_word(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    frame = pd.DataFrame({"Q": ["a", "b"], "A": [1.0, NAN]})
    frame.to_parquet(folder / "train.parquet")
    assert [item["A"] for item in _by_datasets(folder, tmp_path)] == ["1", None]


def _by_datasets(folder: Path, scratch: Path) -> list[dict[str, Any]]:
    datasets.disable_progress_bars()
    keys = Keys(question="Q", answer="A", options=None, context=[])
    source = DatasetFolder(
        kind="dataset_folder",
        path=str(folder),
        sha256=data_folder_sha256(folder),
        members={"mine": DatasetMember(config=None, split="train", keys=keys)},
    )
    found = read_datasets(source, downloads=scratch / "cache", advance=lambda **_: None)
    return found["mine"]
