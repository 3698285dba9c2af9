"""The parts of a command: processes that it runs beside itself and ends with itself."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from socket import AF_INET, SOCK_STREAM, socket

import psutil

from dlplora.errors import DlpLoraError
from flows.settings import HOME, ROOT

HOST = "127.0.0.1"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_START_SECONDS = 120.0
_STOP_SECONDS = 15.0


class PartError(DlpLoraError):
    """A part could not start, or ended."""


class Parts:
    """Processes that are started here; they and all that they start bear one mark.

    Each is the head of a session, so that Ctrl-C reaches this process alone.

    Args:
        mark: The variable of their environment that holds the number of this process.
        environment: What they get beside the environment of this process.
    """

    def __init__(self, mark: str, environment: Mapping[str, str] | None = None) -> None:
        self._mark = mark
        self.environment = os.environ | (environment or {}) | {mark: str(os.getpid())}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a part: this Python on `words`, in the project's root; its log begins anew."""
        HOME.mkdir(parents=True, exist_ok=True)
        with log_file(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self._running[name]

    def check(self) -> None:
        """Raise `PartError` if a part has ended."""
        for name, part in self._running.items():
            if part.poll() is not None:
                raise PartError(f"the {name} has ended; its log is {log_file(name)}")

    def wait(self, name: str, is_ready: Callable[[], bool]) -> None:
        """Wait until a part is ready; raise `PartError` if it ends or takes too long."""
        deadline = time.monotonic() + _START_SECONDS
        while not is_ready():
            if self._running[name].poll() is not None or time.monotonic() > deadline:
                reason = f": {line}" if (line := last_line(name)) else ""
                raise PartError(f"the {name} does not start{reason}; its log is {log_file(name)}")
            time.sleep(0.2)

    def pids(self, *names: str) -> set[int]:
        """Return the numbers of the parts that were started, of all or of some."""
        return {part.pid for name, part in self._running.items() if not names or name in names}

    @contextmanager
    def ending(
        self, first: Callable[[int], bool], *, within: float = _STOP_SECONDS
    ) -> Iterator[None]:
        """End all that bears the mark after the block, even on errors.

        The processes whose number is one of the `first` end before the others, `within` so many
        seconds.
        """
        try:
            yield
        finally:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave some behind
            self._end(first, within=within)
            self._end(lambda _: True, within=_STOP_SECONDS)
            for part in self._running.values():
                part.wait()

    def _end(self, is_meant: Callable[[int], bool], *, within: float) -> None:
        """Ask marked processes to end, and make them after some seconds."""
        deadline = time.monotonic() + within
        asked: set[int] = set()
        while left := [process for process in self._marked() if is_meant(process.pid)]:
            is_late = time.monotonic() > deadline
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    if is_late:
                        process.kill()
                    elif process.pid not in asked:
                        asked.add(process.pid)
                        process.terminate()
            time.sleep(0.1)

    def _marked(self) -> list[psutil.Process]:
        """List the living processes whose environment bears the mark."""
        own, marked = str(os.getpid()), []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if (
                    process.status() != psutil.STATUS_ZOMBIE
                    and process.environ().get(self._mark) == own
                ):
                    marked.append(process)
        return [process for process in marked if process.pid != os.getpid()]


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does, whatever that does at the time."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))


def log_file(name: str) -> Path:
    """Return the file that a part writes to."""
    return HOME / f"{name}.log"


def last_line(name: str) -> str:
    """Return the last line of a part's log; nothing of an empty one."""
    with suppress(OSError):
        lines = log_file(name).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


def answers(url: str) -> bool:
    """Tell whether a server on this machine answers that all is well."""
    with suppress(OSError, HTTPException), urllib.request.urlopen(url, timeout=5):
        return True
    return False


def refuse_taken(port: int, option: str) -> None:
    """Raise `PartError` if a port is taken; `option` chooses another one."""
    with closing(socket(AF_INET, SOCK_STREAM)) as tried:
        if tried.connect_ex((HOST, port)) == 0:
            raise PartError(f"port {port} of {HOST} is taken; choose another one with {option}")


def is_elsewhere(port: int, root: Path) -> bool:
    """Tell whether who listens at a port works in another folder; False if nobody can tell."""
    with suppress(psutil.Error, OSError):
        listening = (
            one.pid
            for one in psutil.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr[1:] == (port,) and one.pid
        )
        return any(Path(psutil.Process(pid).cwd()) != root.resolve() for pid in listening)
    return False
