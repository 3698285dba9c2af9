"""Findings: what ingest met in the raw file of one task."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlplora.records.examples import Kind
from dlplora.records.files import read_json, record_of, write_json


@dataclass(frozen=True)
class Problem:
    """A bad row: its file, what the format calls a row, its number from 1, and what is wrong."""

    file: str
    unit: str
    item: int
    problem: str

    def __str__(self) -> str:
        """Say where the row is, and what is wrong with it."""
        return f"{self.file}: {self.unit} {self.item} {self.problem}"


@dataclass(frozen=True)
class SplitSize:
    """How many distinct questions fell into a split, and how many of them were kept."""

    found: int
    kept: int


@dataclass(frozen=True)
class Findings:
    """The counts of an ingest: read = distinct + merged + skipped.

    `keys` are those of the first of the files. `controls` counts the texts that hold each control
    token of the base model, which are read as plain text; `stripped` the answers and options that
    ended in its end token. The lengths and `most_answers` are of the questions kept.
    """

    task: str
    files: tuple[str, ...]
    kind: Kind
    keys: dict[str, Any]
    read: int
    distinct: int
    merged: int
    skipped: int
    problems: tuple[Problem, ...]
    splits: dict[str, SplitSize]
    longest_question_chars: int
    longest_answer_chars: int
    most_answers: int
    controls: dict[str, int]
    stripped: int


def write_findings(path: Path, findings: Findings) -> None:
    """Write findings.json of one task."""
    write_json(path, asdict(findings))


def read_findings(path: Path) -> Findings:
    """Read findings.json of one task."""
    return record_of(Findings, read_json(path))
