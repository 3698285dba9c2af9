"""The edge of a command, stage or flow: what surrounds it, and how it ends on a user's mistake."""

import getpass
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dlplora.errors import DlpLoraError, is_disk_full

_ASTRAY = {
    # Colours asked for whatever the stream; without them, each library looks whether it has a
    # terminal before it. Rich and Typer, DVC, Prefect.
    *("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
    # `python -m` would not find the project, or find another checkout's.
    "PYTHONSAFEPATH",
    # Of the repository whose hook started us: what `git rev-parse --local-env-vars` lists, without
    # what is set for one command (`git -c`), which names no place.
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_IMPLICIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_SHALLOW_FILE"),
    *("GIT_PREFIX", "GIT_INTERNAL_SUPER_PREFIX", "GIT_GRAFT_FILE", "GIT_REPLACE_REF_BASE"),
    *("GIT_NO_REPLACE_OBJECTS", "GIT_CONFIG"),
}


def set_up_process() -> None:
    """Make this process, and all that it starts, independent of what surrounds it.

    A letter that the output cannot show is written as an escape. To be called before anything is
    computed, by what is an entry point.
    """
    logging.getLogger("dlplora").setLevel(logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    environment = cleaned(os.environ)
    for name in _ASTRAY & os.environ.keys():
        del os.environ[name]
    os.environ.update(environment)


def show_messages() -> None:
    """Show what is logged on stderr, each message as a plain line."""
    logging.basicConfig(format="%(message)s")


def cleaned(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what leads commands astray, and with what they cannot miss.

    Names of files are UTF-8 whatever the locale; a user without an entry in the system's list of
    users, as in many containers, has a name and a home.
    """
    clean = {name: value for name, value in environment.items() if name not in _ASTRAY}
    asked = clean.get("PYTHONIOENCODING", "").partition(":")[0]
    encoding = asked or getattr(sys.stdout, "encoding", None) or "utf-8"
    clean |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": f"{encoding}:backslashreplace"}
    try:
        getpass.getuser()
    except (KeyError, OSError):
        clean["LOGNAME"] = f"uid{os.getuid()}"
    if os.path.expanduser("~") == "~":
        home = Path(".scratch/home").resolve()  # where nobody else writes
        home.mkdir(parents=True, exist_ok=True)
        clean["HOME"] = str(home)
    return clean


def refuse_other_code() -> None:
    """Raise if the project that this runs in has code of its own, and what runs is not that."""
    own, running = Path("dlplora"), Path(__file__).parent
    if (own / Path(__file__).name).is_file() and not own.samefile(running):
        raise DlpLoraError(
            f"{running}: this code would run in {own.resolve().parent}, which has its own; unset "
            f"PYTHONSAFEPATH and PYTHONPATH, and call `python -m dlplora.cli` there"
        )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line and exit code 1 on a user's mistake or a full disk."""
    try:
        yield
    except Exception as error:
        mistake = as_mistake(error)
        if mistake is None:
            raise
        fail(mistake)


def as_mistake(error: Exception) -> DlpLoraError | None:
    """Return what a user can act on: a mistake in the inputs, or a full disk; None of a defect."""
    if isinstance(error, DlpLoraError):
        return error
    if is_disk_full(error):
        return DlpLoraError(f"no space left on the disk: {error}; free some and run again")
    return None


def fail(error: DlpLoraError) -> None:
    """End the process with one line on stderr and exit code 1."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(1)
