"""Raw files as streams of batches of rows: JSON, JSON Lines, CSV and Parquet, in bounded memory.

Rows are numbered from 1 by whoever reads them: every row of the stream counts.
"""

import csv
import glob
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from os import SEEK_END
from pathlib import Path
from typing import Any

import orjson

from dlplora.errors import DataError, choices
from dlplora.records.files import check_no_pointers

_BATCH = 512  # rows whose text fits in a core's own cache
_CHUNK = 2**18
_LARGEST_ITEM = 2**25  # DuckDB reads into twice as much memory
_DUCKDB_CONFIG: dict[str, str | bool | int | float | list[str]] = {
    "threads": 1,
    "autoload_known_extensions": False,
    "enable_external_file_cache": False,  # it would hold the whole file
}
_JSON_QUERY = """SELECT json FROM read_json_objects(
    ?, format='array', maximum_object_size=?, hive_partitioning=false, compression='none')"""
_DUCKDB_ERROR = re.compile(r"at byte (\d+) in record/value (\d+): (.*?)\.(?:\s|$)", re.DOTALL)


@dataclass(frozen=True)
class Unreadable:
    """A row that could not be parsed; `problem` is to follow "line 17 "."""

    problem: str


_FIRST_BYTES = {b"{": "an object", b'"': "a string", b"t": "a truth value", b"f": "a truth value"}
_FIRST_BYTES |= {b"n": "null"} | {bytes([digit]): "a number" for digit in b"-0123456789"}
_COLON: dict[type, Any] = {str: ":", bytes: b":"}
BLANK = Unreadable("")  # an empty line: counted, and no row


@dataclass(frozen=True)
class Format:
    """How files of one kind are read.

    `unit` is what a row is called in messages. In a format of `text_cells` a list stands as
    JSON in its cell.
    """

    unit: str
    batches: Callable[[Path], Iterator[list[Any]]]
    text_cells: bool = False


def raw_files(*raws: Path) -> list[Path]:
    """Return files, and those of folders that hold questions and answers, each once.

    Raises `DataError` if there are none, or if DVC tracks one that is not here.
    """
    found = [path for raw in raws for path in (_files_in(raw) if raw.is_dir() else [raw])]
    if not found:
        raise DataError(
            f"{choices(raws)}: found no file of questions and answers, expected at least one: "
            f"{choices(FORMATS)}"
        )
    distinct: dict[Path, Path] = {}
    for path in found:
        distinct.setdefault(path.resolve(), path)
    return list(distinct.values())


def _files_in(folder: Path) -> list[Path]:
    for tracked in sorted(folder.glob("*.dvc")):
        if not tracked.with_suffix("").exists():
            raise DataError(f"{tracked}: its file is not here; `dvc pull {tracked}` fetches it")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in FORMATS)


def format_of(file: Path) -> Format:
    """Return the format that a file's ending names, once the file looks like UTF-8 or Parquet."""
    if file.suffix.lower() not in FORMATS:
        raise DataError(f"{file}: the ending {file.suffix!r} is none of {choices(FORMATS)}")
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    if not head:
        raise DataError(f"{file}: the file is empty")
    check_no_pointers(file)
    if FORMATS[file.suffix.lower()].text_cells and head.lstrip().startswith((b"[{", b'{"')):
        raise DataError(f"{file}: looks like JSON; name it .json, or .jsonl if a line is an object")
    found = FORMATS[file.suffix.lower()]
    is_text = found.batches is not _parquet_batches
    if is_text and (head.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in head[:4]):
        raise DataError(
            f"{file}: looks like UTF-16 or UTF-32, expected UTF-8; convert it first, "
            f"for example by iconv -f UTF-16 -t UTF-8"
        )
    return found


def _json_batches(file: Path) -> Iterator[list[Any]]:
    """Yield the items of a JSON list: DuckDB cuts the file into items, orjson parses each."""
    import duckdb

    _check_is_list(file)
    pattern = glob.escape(str(file.absolute()))  # absolute: a leading ~ would be the home folder
    with duckdb.connect(config=_DUCKDB_CONFIG) as connection:
        try:
            found = connection.execute(_JSON_QUERY, [pattern, _LARGEST_ITEM])
            while texts := found.fetchmany(_BATCH):
                yield _parsed_all([text for (text,) in texts])
        except duckdb.Error as error:
            raise DataError(f"{file}: {_json_error(str(error))}") from error
    _check_list_ends(file)


def _check_is_list(file: Path) -> None:
    first = b""
    with file.open("rb") as stream:
        chunk = stream.read(_CHUNK).removeprefix(BOM_UTF8)
        while chunk and not (first := chunk.lstrip()[:1]):
            chunk = stream.read(_CHUNK)
    if not first:
        raise DataError(f"{file}: the file is empty")
    if first == b"[":
        return
    found = _FIRST_BYTES.get(first)
    if found is None:
        raise DataError(f"{file}: not JSON: it begins with {first!r}")
    lines = "; name a file of one object a line .jsonl" if first == b"{" else ""
    raise DataError(f'{file}: found {found}, expected a list of {{"Q": …, "A": …}}{lines}')


def _check_list_ends(file: Path) -> None:
    """Refuse a file that breaks off behind a comma, which DuckDB takes for the end."""
    last = b""
    with file.open("rb") as stream:
        end = stream.seek(0, SEEK_END)
        while end and not last:
            start = max(0, end - _CHUNK)
            stream.seek(start)
            last = stream.read(end - start).rstrip()[-1:]
            end = start
    if last != b"]":
        ends = last.decode(errors="backslashreplace")
        raise DataError(f"{file}: not JSON: it ends in '{ends}', expected ']'")


def _json_error(message: str) -> str:
    """Put DuckDB's message about a file in our words; it counts items from 2."""
    if match := _DUCKDB_ERROR.search(message):
        byte, item, reason = match.groups()
        return f"not JSON: item {int(item) - 1}, at its byte {byte}: {reason}"
    if "maximum_object_size" in message:
        most = f"{_LARGEST_ITEM >> 20} MiB"
        return f"an item is larger than {most}, the most"
    return f"not JSON: {' '.join(message.split())}"


def _line_batches(file: Path) -> Iterator[list[Any]]:
    num_lines = 0
    with file.open("rb") as stream:
        while block := stream.read(_CHUNK):
            block += stream.readline(_LARGEST_ITEM + 1)  # a block ends where a line does
            if not num_lines:
                block = block.removeprefix(BOM_UTF8)
            lines = block.removesuffix(b"\n").split(b"\n")
            if len(block) > _LARGEST_ITEM:
                for number, line in enumerate(lines, start=num_lines + 1):
                    if len(line) > _LARGEST_ITEM:
                        most = f"{_LARGEST_ITEM >> 20} MiB"
                        raise DataError(f"{file}: line {number} is longer than {most}, the most")
            num_lines += len(lines)
            yield _parsed_all(lines)


def _parsed_all(texts: Sequence[str | bytes]) -> list[Any]:
    try:
        rows = list(map(orjson.loads, texts))
    except orjson.JSONDecodeError:  # at least one of them
        return list(map(_parsed, texts))
    told = sum(text.count(_COLON[type(text)]) for text in texts)
    return rows if told == _num_colons(rows) else list(map(_parsed, texts))


def _parsed(text: str | bytes) -> Any:
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if not text.strip():
            return BLANK
        return Unreadable(f"is not JSON: {error.msg} (its character {error.pos + 1})")
    # Every colon is in both, but for those of a key that stands twice, which is dropped.
    if text.count(_COLON[type(text)]) > _num_colons(row):
        return Unreadable("has a key twice in one object")
    return row


def _num_colons(parsed: Any) -> float:
    """Count the colons of parsed JSON, written again; infinite if it is nested too deeply."""
    try:
        return orjson.dumps(parsed).count(b":")
    except TypeError:
        return inf


def _csv_batches(file: Path) -> Iterator[list[Any]]:
    rows = _csv_rows(file)
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _csv_rows(file: Path) -> Iterator[Any]:
    """Yield rows as a spreadsheet writes them: with superfluous cells that are empty, too."""
    csv.field_size_limit(_LARGEST_ITEM)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True, delimiter=_delimiter(file))
        try:
            header = _header(next((cells for cells in reader if any(cells)), []))
            _check_columns(file, header)
            width = len(header)
            for cells in reader:
                if not any(cells):
                    yield BLANK
                elif len(cells) == width or (len(cells) > width and not any(cells[width:])):
                    yield dict(zip(header, cells, strict=False))
                else:
                    yield Unreadable(
                        f"has {len(cells)} cells, expected the {width} of the header "
                        f"(it ends in line {reader.line_num})"
                    )
        except csv.Error as error:
            raise DataError(f"{file}: line {reader.line_num}: not CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}: not UTF-8: {_bad_line(file)}; convert it first, for example by "
                f"iconv -f LATIN1 -t UTF-8"
            ) from error


def _bad_line(file: Path) -> str:
    """Name the first line that is no UTF-8."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} holds the byte {line[error.start]:#04x}"
    return "its end"


def _delimiter(file: Path) -> str:
    """Return what parts the cells of the header: the most frequent of comma, semicolon and tab."""
    if file.suffix.lower() == ".tsv":
        return "\t"
    with file.open("rb") as stream:
        first = next((line for line in stream if line.strip(b",;\t\r\n ")), b"")[:_CHUNK]
    counts = {sign: first.count(sign.encode()) for sign in ",;\t"}
    return max(counts, key=lambda sign: counts[sign])


def _header(cells: Sequence[str]) -> list[str]:
    """Return the names of columns, without blanks and marks around them and empty last ones."""
    names = [cell.strip("\ufeff").strip() for cell in cells]
    while names and not names[-1]:
        names.pop()
    return names


def _check_columns(file: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{file}: a column stands twice in the header: {list(names)}")


def _parquet_batches(file: Path) -> Iterator[list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, buffer_size=_CHUNK, pre_buffer=False) as table:
            names = table.schema_arrow.names
            _check_columns(file, names)
            for batch in table.iter_batches(batch_size=_BATCH, use_threads=False):
                rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
                yield [dict(zip(names, values, strict=True)) for values in rows]
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{file}: not Parquet: {' '.join(str(error).split())}") from error


_LINES = Format("line", _line_batches)
_CELLS = Format("row", _csv_batches, text_cells=True)
FORMATS: dict[str, Format] = {
    ".json": Format("item", _json_batches),
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".csv": _CELLS,
    ".tsv": _CELLS,
    ".parquet": Format("row", _parquet_batches),
}
