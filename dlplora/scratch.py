"""The scratch folder: downloads, checkpoints and locks – what is no result and may be deleted.

A lock belongs to the process that holds it and ends with it, however that ends.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel

from dlplora.records.files import file_sha256

logger = logging.getLogger(__name__)
SCRATCH = Path(".scratch")
DOWNLOADS = SCRATCH / "downloads"
ANSWERS = SCRATCH / "answers"
_LOCKS = "locks"
_LIBRARIES = ("torch", "transformers", "peft")


@contextmanager
def alone(name: str, *, scratch: Path = SCRATCH) -> Iterator[None]:
    """Hold the lock `name` for a `with` block; say so and wait while another process holds it."""
    handle = take_lock(name, scratch=scratch)
    try:
        yield
    finally:
        os.close(handle)


def take_lock(name: str, *, scratch: Path = SCRATCH) -> int:
    """Take the lock `name`, waiting for it if need be; return the handle that holds it."""
    file = _lock_file(name, scratch)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        logger.info("%s: process %s is at it; waiting", name, holder)
        with _queue(file).open("w") as queue:
            fcntl.flock(queue, fcntl.LOCK_SH)  # held by all who wait: `is_awaited` asks for it
            fcntl.flock(handle, fcntl.LOCK_EX)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def is_held(name: str, *, scratch: Path = SCRATCH) -> bool:
    """Tell whether a process holds the lock `name`."""
    return _is_locked(_lock_file(name, scratch))


def is_awaited(name: str, *, scratch: Path = SCRATCH) -> bool:
    """Tell whether another process waits for the lock `name`."""
    return _is_locked(_queue(_lock_file(name, scratch)))


def _is_locked(file: Path) -> bool:
    try:
        with file.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _lock_file(name: str, scratch: Path) -> Path:
    return scratch / _LOCKS / f"{name.replace(' ', '-')}.lock"


def _queue(lock: Path) -> Path:
    return lock.with_suffix(".waiting")


def checkpoint_folder(
    name: str,
    *,
    params: Mapping[str, BaseModel | int],
    inputs: Sequence[Path],
    scratch: Path = SCRATCH,
) -> Path:
    """Return where the checkpoint of the stage run `name` stands.

    It depends on the params and the content of the input files that are used, on our code and
    on the libraries' versions; checkpoints of other ones are deleted.
    """
    told = {
        "params": {
            name: value.model_dump() if isinstance(value, BaseModel) else value
            for name, value in params.items()
        },
        "inputs": [file_sha256(path) for path in inputs],
        "code": [file_sha256(path) for path in sorted(Path(__file__).parent.rglob("*.py"))],
        "versions": [version(library) for library in _LIBRARIES],
    }
    fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    folder = scratch / "checkpoints" / name.replace(" ", "-") / fingerprint
    if folder.parent.is_dir():
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
    return folder
