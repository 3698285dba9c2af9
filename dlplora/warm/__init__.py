"""Stages forked from a process that has the libraries loaded: torch and transformers take seconds.

    dlplora repro, flow ── starts ──→ server: loads the libraries, waits
       └ dvc repro                       ↑     └ forks: the stage
          └ python -m tasks.NAME ── its words, environment and standard streams
              waits, forwards signals, ends as its stage does

`server_for` starts a server, whose folder stages find in `DLPLORA_WARM`. No code of this project
is loaded beforehand: a stage runs the code that is there when it starts. Without a server – under
plain `dvc repro`, while the server loads, on systems other than Linux, and where torch is built for
GPUs, whose drivers do not support forks – a stage loads the libraries itself. The server's socket
stands in a folder that only its user can enter.
"""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

_ADDRESS = "DLPLORA_WARM"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# In a forked stage, the process that DVC started and that waits for it.
waiting: int | None = None


@contextmanager
def server_for(root: Path) -> Iterator[dict[str, str]]:
    """Start a server for the stages of a project; yield what stages need in their environment.

    The server ends with the block, or with this process, however that ends.
    """
    if not _can_serve():
        yield {}
        return
    folder = Path(tempfile.mkdtemp(prefix="dlplora-"))
    running = subprocess.Popen(
        [sys.executable, "-m", "dlplora.warm.server", str(folder), str(os.getpid())],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # a stage reports what cannot be loaded
        start_new_session=True,  # a Ctrl-C reaches stages by those that wait for them
    )
    try:
        yield {_ADDRESS: str(folder)}
    finally:
        running.terminate()
        running.wait()
        shutil.rmtree(folder, ignore_errors=True)


def hand_over() -> None:
    """Let a server run this process's `python -m …` and end as that ends, if there is a server.

    Returns if this process has to do it by itself.
    """
    words = sys.orig_argv[1:]
    environment = dict(os.environ)
    folder = environment.pop(_ADDRESS, None)
    if folder is None or words[:1] != ["-m"]:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        try:
            server.connect(socket_in(Path(folder)))
            request = {
                "words": words[1:],
                "environment": environment,
                "cwd": os.getcwd(),
                "waiting": os.getpid(),
            }
            socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
            answer = server.recv(64)
        except OSError:
            return  # the server still loads, or has ended
        if not answer:
            return  # it is another project's
        stage = int(answer)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: _signal(stage, number))
        status = server.recv(64)
    _end_as(os.waitstatus_to_exitcode(int(status)) if status else -signal.SIGKILL)


def _can_serve() -> bool:
    """Tell whether the system has what a server needs, and torch is built for processors alone."""
    if not (hasattr(os, "pidfd_open") and hasattr(socket, "SOCK_SEQPACKET")):
        return False
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    built = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
    return built.get("cuda") is None and built.get("hip") is None


def socket_in(folder: Path) -> str:
    """Return where a server listens."""
    return str(folder / "socket")


def _signal(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _end_as(code: int) -> NoReturn:
    """End with an exit code or, if it is negative, by that signal."""
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    raise SystemExit(code)
