"""The process that stages are forked from: `python -m dlplora.warm.server FOLDER PID`.

It has no threads of Python's and computes nothing, so that a fork is as good as a new process.
"""

import gc
import json
import os
import runpy
import shutil
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from select import select
from threading import Thread
from typing import Any, NoReturn

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

    request: dict[str, Any]
    streams: list[int]
    connection: socket.socket

    def close(self) -> None:
        """Leave its streams and connection to others."""
        for stream in self.streams:
            os.close(stream)
        self.connection.close()


def main(folder: Path, starter: int) -> None:
    """Load the libraries, then fork stages until the process `starter` has ended."""
    stage = None
    try:
        end = os.pidfd_open(starter)
        gc.disable()
        for name in _LIBRARIES:
            import_module(name)
        gc.freeze()  # what was loaded stays, and is shared
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(warm.socket_in(folder))
            listener.listen()
            stage = _serve(listener, end)
    finally:
        if stage is None:
            shutil.rmtree(folder, ignore_errors=True)
    if stage is not None:
        _run(stage)


def _serve(listener: socket.socket, end: int) -> _Stage | None:
    """Fork a stage for each request; return it in the fork, and None when there is no more to do.

    `end` is a handle of the process that the server ends with. Each stage is the child of a fork
    that waits for it, so that stages that run outlive the server.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    while end not in select([listener.fileno(), end], [], [])[0]:
        stage = _accept(listener)
        if stage is None:
            continue
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(end)
            if process := os.fork():
                _wait_for(process, stage)
            return stage
        stage.close()
    return None


def _wait_for(process: int, stage: _Stage) -> NoReturn:
    """Tell the other side of a stage's connection its process and, at its end, how it ended."""
    for stream in stage.streams:
        os.close(stream)
    with suppress(OSError):  # the other side has ended
        stage.connection.send(str(process).encode())
    status = os.waitpid(process, 0)[1]
    with suppress(OSError):
        stage.connection.send(str(status).encode())
    os._exit(0)


def _accept(listener: socket.socket) -> _Stage | None:
    """Read a request; refuse one of another folder, whose code is not the one on sys.path."""
    connection, _ = listener.accept()
    message, streams, _, _ = socket.recv_fds(connection, _LARGEST, 3)
    request: dict[str, Any] = json.loads(message) if len(streams) == 3 else {}
    stage = _Stage(request, streams, connection)
    if request.get("cwd") == os.getcwd():
        return stage
    stage.close()
    return None


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
    os.environ.update(stage.request["environment"])
    warm.waiting = stage.request["waiting"]
    module, *words = stage.request["words"]
    sys.argv = ["-m", *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(connection: socket.socket) -> None:
    """End this process, and at once, when the other side of a connection does."""
    connection.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
