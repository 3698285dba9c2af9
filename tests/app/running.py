"""The app in a process of its own, with runs that a test decides.

python -m tests.app.running ROOT FOLDER [MODEL_URL]
"""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dlplora.app.runs import Run, RunError, StageRun
from dlplora.records.files import atomic_write
from tests.project import ROOT
from tests.waiting import until

NOBODY = "http://127.0.0.1:9"  # where nothing listens
TROUBLE = "no model is trained yet; run `make repro`"
TOLD = "adapter colours: 2/4, 9 s left loss 1.5"


class FakeRuns:
    """Runs that go nowhere until a test says so; a folder holds them for app and test alike."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "runs.json"

    def _read(self) -> dict[str, dict[str, Any]]:
        return dict(json.loads(self._file.read_text())) if self._file.exists() else {}

    def _write(self, run_id: str, values: Mapping[str, Any]) -> None:
        rows = {**self._read(), run_id: values}
        with atomic_write(self._file) as aside:
            aside.write_text(json.dumps(rows, default=str))

    def start(self, deployment: str, parameters: Mapping[str, Any]) -> str:
        number, now = str(uuid.uuid4()), datetime.now(UTC)
        name = f"run-{len(self._read()) + 1}"
        run = Run(number, name, deployment, parameters, "Running", "", False, now, 1.0)
        self._write(number, asdict(run))
        return number

    def end(self, run_id: str, state: str, message: str) -> None:
        """Let a run end."""
        ended = {"state": state, "message": message, "is_over": True}
        self._write(run_id, self._read()[run_id] | ended)

    def recent(self, count: int) -> list[Run]:
        return [self.read(run_id) for run_id in self._read()][::-1][:count]

    def read(self, run_id: str) -> Run:
        rows = self._read()
        if run_id not in rows:
            raise RunError(f"there is no run {run_id!r}")
        return Run(**rows[run_id] | {"began": datetime.fromisoformat(rows[run_id]["began"])})

    def stages(self, run_id: str) -> list[StageRun]:
        return [
            StageRun("base_model", "Cached", "up to date", 0.1, None, ""),
            StageRun("adapter@colours", "Running", "", 3.0, 50.0, TOLD),
        ]

    def lines(self, run_id: str, *, last: int) -> list[str]:
        return [f"adapter colours: {n}/4, 9 s left loss {4 / n:.3g}" for n in (1, 2, 3)]

    def cancel(self, run_id: str) -> None:
        self.end(run_id, "Cancelled", "")

    def start_again(self, run_id: str) -> str:
        return self.start(self.read(run_id).deployment, self.read(run_id).parameters)

    def page(self, run_id: str) -> str:
        return f"http://127.0.0.1:4200/runs/flow-run/{run_id}"


@contextmanager
def app_of(
    root: Path, folder: Path, *, model_url: str = NOBODY, **told: str
) -> Iterator[tuple[str, FakeRuns]]:
    """Serve the pages of a project for the time of a `with` block; yields address and runs.

    `told` is more of its environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "app.log"
    with log.open("wb") as file:
        app = subprocess.Popen(
            [sys.executable, "-m", "tests.app.running", str(root), str(folder), model_url],
            cwd=ROOT,
            env=os.environ | told,
            stdout=file,
            stderr=file,
        )
    try:
        until(lambda: "http://" in log.read_text() or app.poll() is not None, within=60)
        assert app.poll() is None, log.read_text()
        yield log.read_text().split()[-1], FakeRuns(folder)
    finally:
        app.terminate()
        app.wait(30)


def main() -> None:
    """Serve until a signal."""
    from dlplora.app.server import serve
    from dlplora.serving.server import listen

    root, folder, model_url = sys.argv[1:]
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    serve(
        root=Path(root),
        runs=FakeRuns(Path(folder)),
        model_url=model_url,
        model_trouble=lambda: TROUBLE if model_url == NOBODY else None,
        host="127.0.0.1",
        port=port,
        password=os.environ.get("PASSWORD"),
        max_file_mib=int(os.environ.get("MAX_FILE_MIB", "16")),
        tell=lambda address: os.write(1, f"{address}\n".encode()),
    )


if __name__ == "__main__":
    main()
