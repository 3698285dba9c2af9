"""Files that are written atomically: beside their path, then renamed into place."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from dlplora.errors import DlpLoraError, SourceError

T = TypeVar("T")

_POINTER = b"version https://git-lfs"
_ASIDE = re.compile(r"\..+\.(\d+)\.aside")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write a file or folder to; it becomes `path` on success."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    old = path.with_name(f".{path.name}.old.{os.getpid()}.aside")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in (aside, old):  # by a killed run of the same number
        remove(left)
    try:
        yield aside
        if path.is_dir():
            path.replace(old)
        aside.replace(path)
    finally:
        remove(aside)
        remove(old)


def is_aside(path: Path) -> bool:
    """Tell whether a path is one to write aside to, by its name."""
    return _ASIDE.fullmatch(path.name) is not None


def is_being_written(path: Path) -> bool:
    """Tell whether a path is one to write aside to, and its writer still runs."""
    match = _ASIDE.fullmatch(path.name)
    return match is not None and psutil.pid_exists(int(match[1]))


def delete_abandoned(folder: Path) -> None:
    """Delete what writers that were killed left aside in a folder."""
    for path in folder.glob(".*"):
        if is_aside(path) and not is_being_written(path):
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: str, target: str) -> None:
    """Hard-link a file, or copy it where that is not possible."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


@contextmanager
def written_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `path`, replacing what stood there, on success."""
    with atomic_write(path) as aside:
        aside.mkdir()
        yield aside


def write_json(path: Path, value: object) -> None:
    """Write indented UTF-8 JSON with keys in the order given; NaN is refused."""
    with atomic_write(path) as aside:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        aside.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file that this library wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def record_of(kind: type[T], values: object) -> T:
    """Make a record, or a list or dict of them, of what a file holds; lists become tuples.

    Raises pydantic's `ValidationError`, a `ValueError`, if a field lacks, is too many or of
    another type.
    """
    return TypeAdapter(kind).validate_python(values, extra="forbid")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Write rows as one parquet file; the same rows give the same bytes."""
    with atomic_write(path) as aside:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), aside)


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read a parquet file as a list of rows."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(file: Path, expected: str, *, card: str, error: type[DlpLoraError]) -> None:
    """Raise an error unless a file is the one whose hash the card beside it holds."""
    found = file_sha256(file)
    if found != expected:
        raise error(
            f"{file}: truncated or changed: found sha256 {found[:12]}…, {card} beside it has "
            f"{expected[:12]}…"
        )


def check_no_pointers(path: Path) -> None:
    """Raise `SourceError` if a file, or one of a folder, only points to where Git LFS has it."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    for file in files:
        if file.is_file():
            with file.open("rb") as opened:
                beginning = opened.read(len(_POINTER))
            if beginning == _POINTER:
                raise SourceError(
                    f"{file}: holds a pointer of Git LFS, expected the file itself; fetch it with "
                    f"`git lfs pull`"
                )
