"""What the pages know of runs, whoever runs them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from dlplora.errors import DlpLoraError


class RunError(DlpLoraError):
    """There is no such run, or whoever runs it does not answer."""


@dataclass(frozen=True)
class StageRun:
    """A stage within a run. `percent` and `told` are of its last line of progress, if any."""

    name: str
    state: str
    message: str
    seconds: float | None
    percent: float | None
    told: str


@dataclass(frozen=True)
class Run:
    """A run of a deployment, such as `pipeline/this-tree`, by its id.

    `began` and `seconds` are None until it runs; `is_over` tells whether it has ended, however.
    """

    id: str
    name: str
    deployment: str
    parameters: Mapping[str, Any]
    state: str
    message: str
    is_over: bool
    began: datetime | None
    seconds: float | None


class Runs(Protocol):
    """Start, watch and end runs. All raise `RunError`, in one line."""

    def start(self, deployment: str, parameters: Mapping[str, Any]) -> str:
        """Start a run and return its id at once."""

    def recent(self, count: int) -> list[Run]:
        """List the newest runs that somebody or something has started, the newest first."""

    def read(self, run_id: str) -> Run:
        """Return a run."""

    def stages(self, run_id: str) -> list[StageRun]:
        """List the stages of a run and of the runs within it, as they began."""

    def lines(self, run_id: str, *, last: int) -> list[str]:
        """Return the last lines of the log of a run and of the runs within it."""

    def cancel(self, run_id: str) -> None:
        """End a run and all that it has started."""

    def start_again(self, run_id: str) -> str:
        """Start a run with the same parameters; what is done is not done again."""

    def page(self, run_id: str) -> str:
        """Return the address of the page that tells all about a run."""
