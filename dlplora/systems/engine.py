"""The engine that users load from a pipeline's folder."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dlplora.engine.runner import Runner
from dlplora.runtime import Place, best_place
from dlplora.systems.load import Systems


class Engine(Runner):
    """A runner over one system of what a pipeline made.

    It answers until it is closed, by `close` or behind a `with` block; then the base model is as it
    was loaded.
    """

    _attached = ExitStack()  # of nothing, until `load` attaches adapters

    @classmethod
    def load(
        cls,
        folder: str | Path = "data",
        *,
        system: str | None = None,
        place: Place | None = None,
        log: str | Path | None = None,
        **settings: Any,
    ) -> "Engine":
        """Load a system of a folder: the base model, the adapters and router that it names.

        Args:
            folder: The folder that the stages write to, or a model such as `.models/current`.
            system: A name in the params, with the task where it needs one (`single:TASK`); by
                default `default_system`.
            place: Device and dtype; by default the best that this machine has.
            log: A file that every decision is appended to; the params say what a line holds.
            settings: Those of a `Runner`: places, fallback_below, window_chars, language.

        Raises a `DlpLoraError` if anything in the folder cannot be used.
        """
        systems = Systems(folder, [system], place=place or best_place())
        chosen = systems.named(system)
        decisions = systems.decision_log(log, system, chosen)
        with ExitStack() as stack:
            engine = stack.enter_context(chosen.running_as(cls, log=decisions, **settings))
            engine._attached = stack.pop_all()
        return engine

    def close(self) -> None:
        """Take the adapters out of the base model; nothing is answered after that."""
        self._attached.close()
        self._router = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
