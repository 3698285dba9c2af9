"""From a system's params to its pool and its routers: the look-up table of ways to answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.adapters import LoraAdapter, read_adapter
from dlplora.evaluation.run import System
from dlplora.models import Base
from dlplora.params import System as SystemParams
from dlplora.routing.build import build_router


@dataclass(frozen=True)
class Inputs:
    """What a system may be built from: the loaded base, and the folders of its stage."""

    base: Base
    base_folder: Path
    adapters: Path
    artifact: Path
    tasks: Sequence[str]
    seed: int

    def pool(self) -> list[LoraAdapter]:
        """Read the adapters of all tasks."""
        return [
            read_adapter(self.adapters / task, base_fingerprint=self.base.fingerprint)
            for task in self.tasks
        ]


def build_system(params: SystemParams, inputs: Inputs) -> System:
    """Build a system; its `route` in the params says how."""
    return SYSTEMS[params.route](params, inputs)


def _by_text(params: SystemParams, inputs: Inputs) -> System:
    router = build_router(
        params, inputs.artifact, inputs.base_folder, tasks=inputs.tasks, seed=inputs.seed
    )
    return System(inputs.pool(), lambda _: router)


SYSTEMS: dict[str, Callable[[SystemParams, Inputs], System]] = {
    "random": _by_text,
    "uniform": _by_text,
    "top_p": _by_text,
    "top_k": _by_text,
}
