"""The process that stages are forked from: `python -m dlplora.warm.server FOLDER PID`.

It has no threads of Python's and computes nothing, so that a fork is as good as a new process.
"""

import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from dlplora import warm

# What nearly all stages that take long to start load. PEFT is not among it: few stages do.
_LIBRARIES = (
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation.logits_process",
    "pyarrow.parquet",
    "sacrebleu",
    "pydantic",
    "typer",
    "rich.progress",
    "psutil",
    "ruamel.yaml",
)
_LARGEST = 1 << 20  # bytes of a request


@dataclass(frozen=True)
class _Stage:
    """What to run, and the connection to the process that waits for it."""

    words: list[str]
    environment: dict[str, str]
    streams: list[int]
    waiting: int
    connection: socket.socket


def main(folder: Path, ends_with: int) -> None:
    """Load the libraries, then fork stages until a process has ended."""
    stage = None
    try:
        end = os.pidfd_open(ends_with)
        gc.disable()
        for name in _LIBRARIES:
            import_module(name)
        gc.freeze()  # what was loaded stays, and is shared
        with _listening(folder) as listener:
            stage = _serve(listener, end)
    finally:
        if stage is None:
            shutil.rmtree(folder, ignore_errors=True)
    if stage is not None:
        _run(stage)


@contextmanager
def _listening(folder: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(warm.socket_in(folder))
        listener.listen()
        yield listener


def _serve(listener: socket.socket, end: int) -> _Stage | None:
    """Fork a stage for each request; return it in the fork, and None when there is no more to do.

    `end` is a handle of the process that the server ends with; stages that run outlive it, and so
    does the server then.
    """
    running: dict[int, tuple[int, socket.socket]] = {}  # by a handle that tells of its end
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(end, selectors.EVENT_READ)
        has_ended = False
        while running or not has_ended:
            for key, _ in selector.select():
                if key.fd == end:
                    selector.unregister(end)
                    has_ended = True
                elif key.fd != listener.fileno():
                    selector.unregister(key.fd)
                    process, connection = running.pop(key.fd)
                    os.close(key.fd)
                    _tell(connection, os.waitpid(process, 0)[1])
                    connection.close()
                elif (stage := _accept(listener)) is not None:
                    process = os.fork()
                    if process == 0:
                        os.close(end)
                        for handle, (_, connection) in running.items():
                            os.close(handle)  # other stages are not this one's
                            connection.close()
                        return stage
                    for stream in stage.streams:
                        os.close(stream)
                    handle = os.pidfd_open(process)
                    running[handle] = process, stage.connection
                    selector.register(handle, selectors.EVENT_READ)
                    _tell(stage.connection, process)
    return None


def _accept(listener: socket.socket) -> _Stage | None:
    """Read a request; refuse one of another folder, whose code is not the one on sys.path."""
    connection, _ = listener.accept()
    message, streams, _, _ = socket.recv_fds(connection, _LARGEST, 3)
    request: dict[str, Any] = json.loads(message) if len(streams) == 3 else {}
    if request.get("cwd") != os.getcwd():
        for stream in streams:
            os.close(stream)
        connection.close()
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    waiting, _, _ = struct.unpack("3i", credentials)
    return _Stage(request["words"], request["environment"], streams, waiting, connection)


def _tell(connection: socket.socket, number: int) -> None:
    with suppress(OSError):  # the one who waited has ended
        connection.send(str(number).encode())


def _run(stage: _Stage) -> None:
    """Become `python -m` with the stage's words; ends with the process that waits for it."""
    for number, stream in enumerate(stage.streams):
        os.dup2(stream, number)
        os.close(stream)
    encoding = sys.stdout.encoding  # of the environment that the server was started in
    # New ones: those there take what they write to for what it was when they were made.
    sys.stdout, sys.stderr = (
        open(number, "w", 1, encoding, errors, closefd=False)  # noqa: SIM115
        for number, errors in ((1, "strict"), (2, "backslashreplace"))
    )
    Thread(target=_end_with, args=[stage.connection], daemon=True).start()
    os.environ.clear()
    os.environ.update(stage.environment)
    warm.waiting = stage.waiting
    module, *words = stage.words
    sys.argv = ["-m", *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(connection: socket.socket) -> None:
    """End this process, and at once, when the other side of a connection does."""
    connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
