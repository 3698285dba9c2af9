"""How fast ingest reads large files, and in how much memory, beside `datasets.load_dataset`.

    python benchmarks/ingest.py [--rows 1000000]

Writes seeded files of about 500 bytes a row into a temporary folder and reads each in a fresh
process on one core, the readers taking turns; prints the medians and writes them to
benchmarks/results/ingest.json. A rate by CPU seconds is what a core gives that nobody shares.
Linux only: peak memory comes from /proc.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

RESULTS = Path(__file__).parent / "results/ingest.json"
LIBRARIES = ("datasets", "duckdb", "numpy", "orjson", "pyarrow")
ROUNDS = 5
SMALLER = 10  # memory is compared with that of a file of so many times fewer rows
MB = 1e6
WORDS = [
    "which",
    "of",
    "these",
    "answers",
    "is",
    "the",
    "most",
    "likely",
    "opposite",
    "to",
    "say",
    "about",
    "a",
    "word",
    "that",
    "one",
    "person",
    "wrote",
    "down",
    "after",
    "reading",
    "every",
    "question",
    "twice",
    "and",
    "then",
    "Changed",
    "again,",
    "because",
    "nothing",
    "(or",
    "almost",
    "nothing)",
    "was",
    "left:",
    "seven,",
    "eight",
    "or",
    "nine",
    "lines;",
    "12",
    "of",
    "400.",
]


@dataclass(frozen=True)
class Run:
    """One reading of one file in its own process."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Line:
    """The medians of all readings of one file by one reader."""

    reader: str
    format: str
    rows: int
    file_mb: float
    seconds: float
    cpu_seconds: float
    mb_per_second: float
    mb_per_cpu_second: float
    text_mb_per_cpu_second: float
    peak_mib: float
    bytes_per_row_more: float | None


def items(rows: int) -> Iterator[dict[str, str]]:
    """Yield seeded questions and answers; one in 20 stands twice, one in 20 is not ASCII."""
    rng = random.Random(0)
    text = " ".join(rng.choices(WORDS, k=200_000))
    for number in range(rows):
        start = rng.randrange(len(text) - 500)
        twin = number - 7 if number % 20 == 19 else number
        question = f"Question {twin}{'é' if twin % 20 == 5 else ''}: "
        question += " ".join(WORDS) if twin % 20 == 12 else text[start : start + 370]
        yield {"question": question, "answer": text[start + 370 : start + 440]}


def write_files(folder: Path, rows: int) -> dict[str, Path]:
    """Write the same items as JSON Lines, as one JSON list and as Parquet."""
    import orjson
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {ending: folder / f"{rows}.{ending}" for ending in ("jsonl", "json", "parquet")}
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    with (
        files["jsonl"].open("wb") as lines,
        files["json"].open("wb") as one,
        pq.ParquetWriter(files["parquet"], schema) as table,
    ):
        found = items(rows)
        before = b"["
        while part := list(islice(found, 100_000)):
            texts = [orjson.dumps(item) for item in part]
            lines.write(b"\n".join(texts) + b"\n")
            one.write(before + b", ".join(texts))
            before = b", "
            table.write_table(pa.Table.from_pylist(part, schema))
        one.write(b"]")
    return files


def read_by_ingest(file: Path) -> Run:
    """Time dlplora's ingest, its imports left out."""
    _stay_on_one_core()
    import duckdb  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    from dlplora.data.ingest import ingest
    from dlplora.params.inputs import Splits

    splits = Splits(train=400, validation=50, test=60, shares=(0.75, 0.10, 0.15), least=(16, 4, 8))
    return _timed(
        lambda: ingest(file, "task", keys="auto", on_bad_row="refuse", splits=splits, limit=None)
    )


def read_by_datasets(file: Path) -> Run:
    """Time `datasets.load_dataset` with a cache of its own, its imports left out."""
    _stay_on_one_core()
    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=cache)
        import datasets

        datasets.disable_progress_bars()
        return _timed(lambda: datasets.load_dataset("json", data_files=str(file), cache_dir=cache))


def _stay_on_one_core() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _timed(read: Callable[[], object]) -> Run:
    start, cpu_start = time.perf_counter(), time.process_time()
    read()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    status = Path("/proc/self/status").read_text()
    (peak_kib,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return Run(seconds, cpu_seconds, int(peak_kib) / 1024)


def in_fresh_process(read: Callable[[Path], Run], file: Path) -> Run:
    """Run one reading in a process that has read nothing before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(read, file).result()


def measure(folder: Path, rows: int) -> list[Line]:
    """Read every file by every reader, in turns, and return the medians."""
    files = {size: write_files(folder, size) for size in (rows // SMALLER, rows)}
    readers = {"dlplora": read_by_ingest, "datasets": read_by_datasets}
    kinds = [("dlplora", ending) for ending in ("jsonl", "json", "parquet")]
    kinds += [("datasets", ending) for ending in ("jsonl", "json")]
    runs: dict[tuple[str, str, int], list[Run]] = {}
    for number in range(ROUNDS):
        for size in files:
            for reader, ending in kinds:
                run = in_fresh_process(readers[reader], files[size][ending])
                runs.setdefault((reader, ending, size), []).append(run)
                _say(f"round {number + 1}: {reader} {ending} {size}: {run.seconds:.1f} s")
    peaks = {kind: statistics.median(run.peak_mib for run in part) for kind, part in runs.items()}
    lines = []
    for (reader, ending, size), part in runs.items():
        seconds = statistics.median(run.seconds for run in part)
        cpu_seconds = statistics.median(run.cpu_seconds for run in part)
        file_mb = files[size][ending].stat().st_size / MB
        text_mb = files[size]["jsonl"].stat().st_size / MB
        more = peaks[reader, ending, rows] - peaks[reader, ending, rows // SMALLER]
        lines.append(
            Line(
                reader=reader,
                format=ending,
                rows=size,
                file_mb=round(file_mb, 1),
                seconds=round(seconds, 2),
                cpu_seconds=round(cpu_seconds, 2),
                mb_per_second=round(file_mb / seconds, 1),
                mb_per_cpu_second=round(file_mb / cpu_seconds, 1),
                text_mb_per_cpu_second=round(text_mb / cpu_seconds, 1),
                peak_mib=round(peaks[reader, ending, size], 1),
                bytes_per_row_more=(
                    round(more * 2**20 / (rows - rows // SMALLER), 1) if size == rows else None
                ),
            )
        )
    return lines


def table(lines: list[Line]) -> str:
    """Lay out the lines as a table of Markdown."""
    heads = ["reader", "file", "rows", "MB", "s", "CPU s", "MB/s", "MB/CPU s", "text MB/CPU s"]
    heads += ["peak MiB", "more bytes a row"]
    rows = [[str("" if cell is None else cell) for cell in asdict(line).values()] for line in lines]
    rows = [heads, ["-" * len(head) for head in heads], *rows]
    widths = [max(len(row[place]) for row in rows) for place in range(len(heads))]
    return "".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        + " |\n"
        for row in rows
    )


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder), rows)
    hardware = {"cpu": _cpu(), "cores": os.cpu_count(), "cores_used": 1}
    versions = {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
    found = {"hardware": hardware, "versions": versions, "rounds": ROUNDS}
    found["lines"] = [asdict(line) for line in lines]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(table(lines))


if __name__ == "__main__":
    main()
