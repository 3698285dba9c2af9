"""The server of the newest model, beside the app: started, followed and restarted."""

import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dlplora.errors import DlpLoraError, ModelError
from dlplora.params.load import load_params
from dlplora.params.project import PARAMS_FILE
from dlplora.scratch import SCRATCH, is_held
from flows.parts import HOST, PartError, Parts, answers, is_elsewhere, last_line, refuse_taken

CURRENT = Path(".models/current")
DATA = Path("data")
_NAME = "model"
_COMMAND = ("-m", "dlplora.cli", "serve", "--all-systems")
_RESULTS = ("data/adapters/*/training.json", "data/routers/*/router.json")
_POLL_SECONDS = 2.0
_AGAIN_SECONDS = 10.0

Results = frozenset[tuple[Path, int]]


@dataclass
class _Serving:
    """A server that was started, and what it serves."""

    process: subprocess.Popen[bytes]
    model: Path
    results: Results
    began: float
    is_asked_to_end: bool = False


class ModelServer:
    """`dlplora serve` for the model in production, else for the pipeline's own results.

    It is started once there is a model, and again when it has ended or there is a newer one. A
    server that somebody else has started at the same port is left alone.

    Args:
        parts: What starts processes and ends them in the end.
        root: The folder of the project.
        port: Where the server listens.
        command: How it is started.
    """

    def __init__(
        self, parts: Parts, *, root: Path, port: int, command: Sequence[str] = _COMMAND
    ) -> None:
        self.url = f"http://{HOST}:{port}"
        self._parts = parts
        self._root = root
        self._port = port
        self._command = command
        self._serving: _Serving | None = None
        self._reason: str | None = None
        self._is_over = threading.Event()

    @property
    def trouble(self) -> str | None:
        """Why it does not answer, as far as that is known: what it said last, if it has ended."""
        if self._serving is None or self._serving.process.poll() is None:
            return self._reason
        line = last_line(_NAME)
        return (
            line if line.startswith("error:") else "the model's server has ended; it starts again"
        )

    @contextmanager
    def kept_up(self) -> Iterator[None]:
        """Look after the server within the block; who has made the parts ends it."""
        watching = threading.Thread(target=self._watch)
        watching.start()
        try:
            yield
        finally:
            self._is_over.set()
            watching.join()

    def _watch(self) -> None:
        while not self._is_over.is_set():
            try:
                self._look()
            except (DlpLoraError, OSError) as error:
                self._reason = str(error)
            self._is_over.wait(_POLL_SECONDS)

    def _look(self) -> None:
        """Start the server, ask it to end, or let things be."""
        serving = self._serving
        if serving is None:
            self._start()
        elif serving.process.poll() is None:
            if self._reason and answers(f"{self.url}/health"):
                self._reason = None  # it is loaded
            if not serving.is_asked_to_end and self._is_outdated(serving):
                serving.is_asked_to_end = True
                serving.process.terminate()
        elif serving.is_asked_to_end or self._may_be_tried_again(serving):
            self._serving = None
            self._start()

    def _start(self) -> None:
        """Start the server unless there is one, or no model; raise what is in the way."""
        if answers(f"{self.url}/health"):
            self._reason = None
            if is_elsewhere(self._port, self._root):
                raise PartError(
                    f"the server of another project is at port {self._port}; choose another one "
                    f"with --server-port"
                )
            return
        model = model_to_serve(self._root)
        refuse_taken(self._port, "--server-port")
        results = results_of(self._root)
        words = [*self._command, "--port", str(self._port), "--model", str(self._root / model)]
        process = self._parts.start(_NAME, words)
        self._reason = f"{model} is being loaded"
        self._serving = _Serving(process, model, results, began=time.monotonic())

    def _may_be_tried_again(self, serving: _Serving) -> bool:
        """Tell whether to restart a server that ended by itself; not while the pipeline writes."""
        is_early = time.monotonic() < serving.began + _AGAIN_SECONDS
        return not is_early and not (serving.model == DATA and self._is_pipeline_at_work())

    def _is_outdated(self, serving: _Serving) -> bool:
        """Tell whether newer, complete results exist than the pipeline's results served."""
        if serving.model == CURRENT:
            return False  # the server follows that link by itself
        if _is_promoted(self._root):
            return True
        if serving.results == results_of(self._root) or self._is_pipeline_at_work():
            return False
        with suppress(ModelError):  # something is missing
            return model_to_serve(self._root) == DATA
        return False

    def _is_pipeline_at_work(self) -> bool:
        return is_held("repro", scratch=self._root / SCRATCH)


def model_to_serve(root: Path) -> Path:
    """Return the model in production, else the pipeline's data if its default system is there.

    Raises a `DlpLoraError` that says what is missing.
    """
    if _is_promoted(root):
        return CURRENT
    params = load_params(root / PARAMS_FILE)
    name = params.default_system
    system = params.systems[name]
    folders = {"data/base", system.adapters, system.artifact, system.router}
    if system.adapters == "data/adapters":
        folders |= {f"data/adapters/{task}" for task in params.tasks}
    if missing := sorted(folder for folder in folders if not (root / folder).is_dir()):
        raise ModelError(
            f"no model to serve yet: {name} needs {missing[0]}; run `make repro`, or train it here"
        )
    return DATA


def _is_promoted(root: Path) -> bool:
    return (root / CURRENT).is_symlink() and (root / CURRENT).is_dir()


def results_of(root: Path) -> Results:
    """Return what changes with the pipeline's results: files of adapters and routers."""
    files = [file for pattern in _RESULTS for file in root.glob(pattern)]
    return frozenset((file, file.stat().st_mtime_ns) for file in files)
