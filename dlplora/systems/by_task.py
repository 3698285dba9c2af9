"""Systems that need the task of each question (oracle task), and answer by its adapter."""

from collections.abc import Sequence
from pathlib import Path

from dlplora.adapters import LoraAdapter
from dlplora.params.systems import ByTask
from dlplora.records.routes import Route
from dlplora.systems.system import Inputs, System, pooled


def build_by_task(_: ByTask, inputs: Inputs) -> System:
    """Build the system of one adapter for each task."""
    return told_system(inputs, inputs.pool(), inputs.adapters)


def told_system(inputs: Inputs, adapters: Sequence[LoraAdapter], folder: Path) -> System:
    """Build the system that answers each question by the adapter of its task's name.

    The adapters stem from `folder`.
    """
    return System(inputs.base, pooled(adapters, folder), told=_routes)


def _routes(tasks: Sequence[str]) -> tuple[Route, ...]:
    return tuple(Route((task,), (1.0,)) for task in tasks)
