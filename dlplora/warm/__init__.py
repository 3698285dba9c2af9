"""Stages forked from a process that has the libraries loaded: torch and transformers take seconds.

    dvc repro ── python -m tasks.FIRST ── starts ───→ server: loads the libraries, waits
       └ python -m tasks.NAME ── its words, environment and standard streams ──→ server
           waits, hands signals on, ends as its stage does          └ forks: the stage

The first stage of a `dvc repro` starts the server and runs by itself; the server ends with that
`dvc`. Who runs `dvc` many times, as flows do, has a server of its own (`server_for`) and says where
it is by `DLPLORA_WARM`; an empty `DLPLORA_WARM` asks for none.

Nothing of this project itself is loaded beforehand, so that a stage runs the code that is there
when it starts. Without a server – while it loads, on systems other than Linux, where torch is built
for GPUs, whose drivers do not like forks – a stage loads what it needs by itself. The server's
socket stands in a folder that only its user can enter.
"""

import json
import os
import runpy
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

_ADDRESS = "DLPLORA_WARM"
_NOT_ITS = (_ADDRESS, "PYTHONSAFEPATH")  # with which it would load another checkout's code
_LONGEST_ADDRESS = 107  # of a socket, in Linux
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# In a forked stage, the process that DVC started and that waits for it.
waiting: int | None = None


@contextmanager
def server_for(root: Path) -> Iterator[dict[str, str]]:
    """Start a server for the stages of a project; yield what their environment has to say.

    It ends with the block, or with this process, however that ends.
    """
    if not _can_serve():
        yield {}
        return
    folder = Path(tempfile.mkdtemp(prefix="dlplora-"))
    running = _start(folder, root, os.getpid())
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
    if waiting is not None or words[:1] != ["-m"]:
        return
    said = os.environ.get(_ADDRESS)
    folder = _folder_of_dvc() if said is None else Path(said) if said else None
    if folder is None:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        try:
            server.connect(socket_in(folder))
            environment = {name: value for name, value in os.environ.items() if name != _ADDRESS}
            request = {"words": words[1:], "environment": environment, "cwd": os.getcwd()}
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


def _folder_of_dvc() -> Path | None:
    """Return where the server of the `dvc` that runs this stage is; if there is none, start it."""
    if not _can_serve():
        return None
    dvc = os.getppid()
    about = Path(f"/proc/{dvc}")
    try:
        words = about.joinpath("cmdline").read_bytes().split(b"\0")
        if not any(word.rpartition(b"/")[2] == b"dvc" for word in words):
            return None
        # Its start, in ticks since the system's, tells it from others that had the same number.
        started = about.joinpath("stat").read_text().rpartition(")")[2].split()[19]
        folder = Path(tempfile.gettempdir()) / f"dlplora-{os.getuid()}-{dvc}-{started}"
        if len(socket_in(folder)) > _LONGEST_ADDRESS:
            return None
        if _is_made(folder):
            _start(folder, Path(), dvc)
            return None
        found = folder.lstat()
    except OSError:
        return None  # a stage does without a server
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if is_own and not found.st_mode & 0o077 else None


def _is_made(folder: Path) -> bool:
    """Make a folder that only its user can enter; tell whether it was not there before."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        return False
    return True


def _can_serve() -> bool:
    """Tell whether the system has what a server needs, and torch is built for processors alone."""
    if not (hasattr(os, "pidfd_open") and hasattr(socket, "SOCK_SEQPACKET")):
        return False
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return False
    built = runpy.run_path(str(Path(torch.origin).with_name("version.py")))
    return built.get("cuda") is None and built.get("hip") is None


def _start(folder: Path, root: Path, ends_with: int) -> subprocess.Popen[bytes]:
    """Start a server for the stages of a project, which ends with a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "dlplora.warm.server", str(folder), str(ends_with)],
        cwd=root,
        env={name: value for name, value in os.environ.items() if name not in _NOT_ITS},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # what cannot be loaded, a stage says itself
        start_new_session=True,  # a Ctrl-C reaches stages by those that wait for them
    )


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
