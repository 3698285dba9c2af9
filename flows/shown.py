"""What the flows show on Prefect's pages: progress, tables of stages and scores, the report."""

import os
import re
import shutil
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from dlplora.records.files import read_json
from flows.settings import SCRATCH

REPORTS_URL = "DLPLORA_REPORTS_URL"  # where `flows.ui` serves the folder of reports
REPORTS = SCRATCH / "reports"
_REPORT = Path("data/report")
_COMPARISON = Path("data/comparison.json")
_PROGRESS = re.compile(r"(.+): (\d+)/(\d+), \d+ s left\b ?.*")
_PICTURE = re.compile(r"!\[([^]]*)\]\((figures/[\w.-]+\.svg)\)")


@dataclass(frozen=True)
class StageRow:
    """A line of the table of stages."""

    stage: str
    state: str
    detail: str
    seconds: float | None


class Bar:
    """A progress artifact that begins with the first progress line of a stage."""

    def __init__(self, stage: str) -> None:
        self._key = re.sub(r"[^a-z0-9]+", "-", stage.lower())  # as keys of artifacts have to be
        self._artifact: UUID | None = None

    def hear(self, line: str) -> None:
        """Move the bar if the line tells progress, such as "adapter x: 10/40, 9 s left"."""
        found = _PROGRESS.fullmatch(line)
        if found is None or not int(found[3]):
            return
        percent = min(100.0, 100 * int(found[2]) / int(found[3]))
        if self._artifact is None:
            created = create_progress_artifact(percent, key=self._key, description=line)
            self._artifact = cast(UUID, created)
        else:
            update_progress_artifact(self._artifact, percent, description=line)


def show_stages(rows: Iterable[StageRow]) -> None:
    """Show each stage with its state and seconds."""
    create_table_artifact(
        [asdict(row) for row in rows], key="stages", description="Stages in the order of the graph."
    )


def show_scores(root: Path) -> None:
    """Show the comparison of systems, if there is one: fractions of 1, intervals of 95 %."""
    if not (root / _COMPARISON).exists():
        return
    table = [
        {"setting": setting, "system": system}
        | {name: None if value is None else round(value, 3) for name, value in scores.items()}
        for setting, systems in _comparison(root).items()
        for system, scores in systems.items()
    ]
    create_table_artifact(table, key="metrics", description="Fractions of 1, intervals of 95 %.")


def read_scores(root: Path) -> dict[str, float]:
    """Read the score of each system on the held-out items."""
    return {name: round(row["score"], 3) for name, row in _comparison(root)["iid"].items()}


def _comparison(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    read: dict[str, dict[str, dict[str, Any]]] = read_json(root / _COMPARISON)
    return read


def show_report(root: Path, name: str) -> None:
    """Show the report, if there is one, as markdown with its pictures, and link to its page.

    The link is to a copy, under that name, which `flows.ui` serves.
    """
    folder = root / _REPORT
    if not (folder / "report.md").exists():
        return

    def inlined(found: re.Match[str]) -> str:
        picture = b64encode((folder / found[2]).read_bytes()).decode()
        return f"![{found[1]}](data:image/svg+xml;base64,{picture})"

    text = (folder / "report.md").read_text(encoding="utf-8")
    create_markdown_artifact(_PICTURE.sub(inlined, text), key="report")
    shutil.copytree(folder, REPORTS / name, dirs_exist_ok=True)
    create_link_artifact(report_link(name), link_text=f"Report of {name}", key="report-page")


def report_link(name: str) -> str:
    """Return the address of a report: where `flows.ui` serves it, else its file."""
    served = os.environ.get(REPORTS_URL)
    return f"{served}/{name}/" if served else (REPORTS / name / "index.html").as_uri()
