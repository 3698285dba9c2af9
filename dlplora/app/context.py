"""What all pages work with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dlplora.app.commands import Commands
from dlplora.app.model_client import ModelClient, Served, ServerError
from dlplora.app.runs import Runs
from dlplora.project.files import Project


@dataclass(frozen=True)
class Context:
    """The project, who runs it, who answers, and where uploads and tables to download stand.

    `trouble` tells why the model's server cannot be asked, if that is known.
    """

    project: Project
    runs: Runs
    commands: Commands
    server: ModelClient
    trouble: Callable[[], str | None]
    files: Path

    def served(self) -> Served:
        """Return what is served; `ServerError` tells why nothing is, and what to run."""
        if reason := self.trouble():
            raise ServerError(reason)
        return self.server.served()

    @property
    def root(self) -> Path:
        """The folder of the project."""
        return self.project.root
