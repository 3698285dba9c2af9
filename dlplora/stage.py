"""The edge of a stage: its command line, progress bars, time and memory."""

import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dlplora import warm
from dlplora.edge import one_line_errors, refuse_other_code, set_up_process, show_messages
from dlplora.errors import DlpLoraError
from dlplora.fingerprints import check_code
from dlplora.params.fields import is_plain
from dlplora.records.files import write_json
from dlplora.scratch import alone
from dlplora.words import Advance

_PLAIN_SECONDS = 5.0


def run(main: Callable[..., None]) -> None:
    """Run a stage's `main` on the command line's words; a user's mistake is one line, exit 1.

    A second run of the same stage waits until the first has ended, and then does nothing if its
    pipeline was killed meanwhile.
    """
    gc.freeze()  # what was loaded stays
    gc.enable()
    set_up_process()
    show_messages()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    pipeline, name = _starter(), stage_name()
    with one_line_errors():
        refuse_other_code()
        check_code(code_file(), Path())
        with alone(name):
            if _starter() != pipeline:
                raise DlpLoraError(f"{name}: the pipeline that started it has ended; not run")
            app()


def _starter() -> int:
    """Return the process that started this stage, or the one that inherits those of dead ones."""
    return os.getppid() if warm.waiting is None else psutil.Process(warm.waiting).ppid()


def code_file() -> Path:
    """Return the file that says what this process's stage is made of."""
    return Path("data/code", f"{Path(sys.argv[0]).stem}.json")


def stage_name() -> str:
    """Name the stage run of this process, such as "adapter my_task"."""
    stage = Path(sys.argv[0]).stem
    item = sys.argv[1] if len(sys.argv) > 1 and is_plain(sys.argv[1]) else ""
    return f"{stage} {item}".rstrip()


def write_timing(path: Path, *, parts: Mapping[str, float] | None = None) -> None:
    """Write what this stage took since its process began: seconds and peak memory in MiB.

    `parts` are seconds of parts of its work, by name.
    """
    seconds = time.time() - psutil.Process().create_time()
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        peak_kib //= 1024
    told: dict[str, Any] = {
        "seconds": round(seconds, 2),
        "memory_mib": round(peak_kib / 1024, 1),
    }
    if parts is not None:
        told["parts"] = {name: round(taken, 2) for name, taken in parts.items()}
    write_json(path, told)


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show a bar with the time left; without a terminal, a plain line every few seconds.

    Yields `advance`; the bar appears with the first step, and figures are shown behind it.
    """
    console = Console(stderr=True)
    if not (sys.stderr.isatty() and console.is_terminal):
        yield _plain_lines(title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=console) as bar:
        row = bar.add_task(title, total=total, figures="", visible=False)

        def advance(n: int = 1, **figures: Any) -> None:
            bar.update(row, advance=n, figures=_figures(figures), visible=True)

        yield advance


def _plain_lines(title: str, total: int) -> Advance:
    started = shown = time.monotonic()
    done = 0

    def advance(n: int = 1, **figures: Any) -> None:
        nonlocal shown, done
        done += n
        now = time.monotonic()
        if now - shown < _PLAIN_SECONDS and done < total:
            return
        shown = now
        left = (now - started) / max(done, 1) * (total - done)
        line = f"{title}: {done}/{total}, {left:.0f} s left {_figures(figures)}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    return advance


def _figures(figures: dict[str, Any]) -> str:
    return "  ".join(
        f"{name.replace('_', ' ')} {_figure(value)}" for name, value in figures.items()
    )


def _figure(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
