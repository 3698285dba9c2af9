"""Answers that are kept, so that the same batch is never answered twice.

What a batch is answered is a pure function of the base model, its prompts and limits, the adapters
with their weights, the code and the machine. An entry is named by the hash of all that. Losing
entries costs time and nothing else.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from dlplora.records.files import atomic_write, delete_abandoned, record_of
from dlplora.records.routes import Route
from dlplora.records.scores import OptionScores

logger = logging.getLogger(__name__)
T = TypeVar("T")
_MIB = 1 << 20


@dataclass(frozen=True)
class Answered:
    """What one prompt was answered: a text and a route for each question that was begun.

    `options` are the scores of a multiple-choice question's options.
    """

    texts: tuple[str, ...]
    routes: tuple[Route, ...]
    options: OptionScores | None

    def filled(self, count: int) -> list[tuple[str, Route]]:
        """Return as many answers as questions; those that were not begun are empty."""
        begun = list(zip(self.texts, self.routes, strict=True))
        return [*begun, *[("", self.routes[-1])] * (count - len(begun))]


class AnswerStore:
    """A folder of answered batches.

    Two processes may share it: an entry is written atomically and checked when it is read. If the
    folder cannot be written or read, one warning says so, and no more answers are kept.

    Args:
        folder: Where the entries stand.
        max_mib: What they may take; 0 keeps none.
        surroundings: What all answers depend on – base model, code, machine –, as JSON.
    """

    def __init__(self, folder: Path, *, max_mib: int, surroundings: Any) -> None:
        self._folder = folder if max_mib else None
        self._surroundings = surroundings
        self._max_bytes = max_mib * _MIB
        self.num_found = 0  # batches that were here
        self.num_answered = 0  # and those that were not

    def batch(self, decides: Any, answer: Callable[[], list[Answered]]) -> list[Answered]:
        """Return what a batch was answered before, or else answer it and keep that.

        `decides` is what else the answers depend on, as JSON.
        """
        told = json.dumps([self._surroundings, decides])
        name = hashlib.sha256(told.encode()).hexdigest()
        found = self._guarded(lambda folder: _read(_file(folder, name)))
        if found is not None:
            self.num_found += 1
            return found
        made = answer()
        self.num_answered += 1
        self._guarded(lambda folder: _write(_file(folder, name), made))
        return made

    def finish(self) -> None:
        """Say what was found, and delete the entries unused for longest if there are too many."""
        told = f"{self.num_answered} batches answered"
        if self._folder is not None:
            told += f", {self.num_found} found in {self._folder}"
        logger.info(told)
        self._guarded(lambda folder: _trim(folder, self._max_bytes))

    def _guarded(self, action: Callable[[Path], T]) -> T | None:
        if self._folder is None:
            return None
        try:
            return action(self._folder)
        except OSError as error:
            logger.warning("%s: %s; answers are not kept", self._folder, error.strerror or error)
            self._folder = None
            return None


def _file(folder: Path, name: str) -> Path:
    return folder / name[:2] / f"{name}.json"


def _read(file: Path) -> list[Answered] | None:
    """Read an entry and note its use; None if there is none, or a damaged one."""
    try:
        checksum, _, content = file.read_bytes().partition(b"\n")
        os.utime(file)
    except FileNotFoundError:
        return None
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        return None
    return record_of(list[Answered], json.loads(content))


def _write(file: Path, answered: list[Answered]) -> None:
    content = json.dumps([asdict(one) for one in answered], ensure_ascii=False).encode()
    with atomic_write(file) as aside:
        aside.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def _trim(folder: Path, max_bytes: int) -> None:
    entries = []
    for inner in folder.glob("*/"):
        delete_abandoned(inner)
        for file in inner.glob("*.json"):
            try:
                status = file.stat()
            except FileNotFoundError:  # another process trims, too
                continue
            entries.append((status.st_mtime_ns, status.st_size, file))
    total = sum(size for _, size, _ in entries)
    for _, size, file in sorted(entries):
        if total <= max_bytes:
            return
        file.unlink(missing_ok=True)
        total -= size
