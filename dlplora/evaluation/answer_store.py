"""Answers that are kept, so that the same batch is never answered twice.

What a batch is answered is a pure function of the base model, its prompts and limits, the adapters
with their weights, the code and the machine. An entry is named by the hash of all that. Losing
entries costs time and nothing else.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from dlplora.data.checksums import data_folder_sha256
from dlplora.errors import DlpLoraError
from dlplora.records.files import atomic_write, delete_abandoned, file_sha256, record_of
from dlplora.records.routes import Route
from dlplora.records.scores import OptionScores
from dlplora.runtime import Place, surroundings
from dlplora.scratch import ANSWERS

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
        """Return as many answers as questions; those that were not begun are empty.

        Of a prompt that was split too often, the first count.
        """
        begun = list(zip(self.texts, self.routes, strict=True))[:count]
        return [*begun, *[("", self.routes[-1])] * (count - len(begun))]


@dataclass(frozen=True)
class AnsweredBatch:
    """The prompts of a batch as they were answered, and the seconds that it took then."""

    answered: tuple[Answered, ...]
    seconds: float


class AnswerStore:
    """A folder of answered batches, used in a `with` block.

    Two processes may share it: an entry is written atomically and checked when it is read. If the
    folder cannot be written or read, one warning says so, and no more answers are kept.

    Args:
        folder: Where the entries stand.
        max_mib: What they may take when the block ends; 0 keeps none.
        surroundings: What all answers depend on – base model, code, machine –, as JSON.
    """

    def __init__(self, folder: Path, *, max_mib: int, surroundings: Any) -> None:
        self._folder = folder
        self._is_used = max_mib > 0
        self._max_bytes = max_mib * _MIB
        self._surroundings = surroundings
        self.num_found = 0  # batches that were here
        self.num_answered = 0  # and those that were not

    def __enter__(self) -> "AnswerStore":
        return self

    def __exit__(self, *_: object) -> None:
        """Say what was found, and delete the entries unused for longest if there are too many."""
        logger.info(
            "%d batches answered, %d found in %s", self.num_answered, self.num_found, self._folder
        )
        with suppress(OSError):
            _trim(self._folder, self._max_bytes)

    def batch(self, decides: Any, answer: Callable[[], list[Answered]]) -> AnsweredBatch:
        """Return how a batch was answered before, or else answer it and keep that.

        `decides` is what else the answers depend on, as JSON.
        """
        told = json.dumps([self._surroundings, decides])
        name = hashlib.sha256(told.encode()).hexdigest()
        file = self._folder / name[:2] / f"{name}.json"
        found = self._guarded(lambda: _read(file))
        if found is not None:
            self.num_found += 1
            return found
        start = time.perf_counter()
        answered = tuple(answer())
        made = AnsweredBatch(answered, time.perf_counter() - start)
        self.num_answered += 1
        self._guarded(lambda: _write(file, made))
        return made

    def _guarded(self, action: Callable[[], T]) -> T | None:
        if not self._is_used:
            return None
        try:
            return action()
        except OSError as error:
            logger.warning("%s: %s; answers are not kept", self._folder, error.strerror or error)
            self._is_used = False
            return None


def kept_answers(*, code: Path, base: Path, place: Place, max_mib: int) -> AnswerStore:
    """Return the answers that are kept of a base model's folder, by the code that a file tells."""
    return AnswerStore(
        ANSWERS,
        max_mib=max_mib,
        surroundings=[file_sha256(code), data_folder_sha256(base), surroundings(place)],
    )


def _read(file: Path) -> AnsweredBatch | None:
    """Read an entry and note its use; None if there is none, or a damaged one."""
    try:
        checksum, _, content = file.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        return None
    try:
        found = record_of(AnsweredBatch, json.loads(content))
    except (ValueError, DlpLoraError):  # of another version
        return None
    with suppress(OSError):  # another user's, perhaps
        os.utime(file)
    return found


def _write(file: Path, batch: AnsweredBatch) -> None:
    content = json.dumps(asdict(batch), ensure_ascii=False).encode()
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
