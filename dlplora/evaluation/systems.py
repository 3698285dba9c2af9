"""From a system's params to its pool and its routers: the look-up table of ways to answer."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlplora.adapters import LoraAdapter, read_adapters
from dlplora.engine.runner import Runner
from dlplora.evaluation.run import System
from dlplora.lora.cluster import Cluster
from dlplora.lora.fusion import fuse
from dlplora.models import Base
from dlplora.params import FusionRoute, GatedSystem, LogoRoute, OwnExpertRoute, TopK
from dlplora.params import System as SystemParams
from dlplora.records.routes import Route
from dlplora.routing.build import build_router, load_classifier, router_of
from dlplora.routing.gated import GatedRouter
from dlplora.routing.logo import build_logo
from dlplora.routing.simple import FixedRouter


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
        return self.read(self.adapters / task for task in self.tasks)

    def read(self, folders: Iterable[Path]) -> list[LoraAdapter]:
        """Read adapters of the base model."""
        return read_adapters(folders, base_fingerprint=self.base.fingerprint)


def build_system(params: SystemParams, inputs: Inputs) -> System:
    """Build a system; its `route` in the params says how."""
    return SYSTEMS[params.route](params, inputs)


def build_gated(
    params: GatedSystem, base: Base, *, base_folder: Path, experts: Path, router: Path
) -> System:
    """Build a system that mixes all experts of its clusters by a router's probabilities."""
    clusters = [
        Cluster.load(experts / name, base_fingerprint=base.fingerprint) for name in params.clusters
    ]
    tasks = [task for cluster in clusters for task in cluster.tasks]
    gated = GatedRouter(load_classifier(router, base=base_folder, tasks=tasks), clusters)
    return System([expert for cluster in clusters for expert in cluster.experts], lambda _: gated)


def _own_expert(params: OwnExpertRoute, inputs: Inputs) -> System:
    """Build CGC-LoRA as published: it is told the task, whose folded experts answer."""
    folders = []
    for task in inputs.tasks:
        places = [inputs.artifact / name / "adapters" / task for name in params.clusters]
        folders.append(next((place for place in places if place.is_dir()), places[0]))
    return System(inputs.read(folders), FixedRouter)


def _by_text(params: SystemParams, inputs: Inputs) -> System:
    router = build_router(
        params, inputs.artifact, inputs.base_folder, tasks=inputs.tasks, seed=inputs.seed
    )
    return System(inputs.pool(), lambda _: router)


def _by_probe(params: LogoRoute, inputs: Inputs) -> System:
    pool = inputs.pool()
    with Runner.over(inputs.base, pool) as runner:
        probe = build_logo(params, inputs.base.model, pool, runner.inputs)
    return System(pool, lambda _: probe)


def _fusion(params: FusionRoute, inputs: Inputs) -> System:
    """Retrieve k adapters for a text and answer by one that averages their matrices."""
    classifier = load_classifier(inputs.artifact, base=inputs.base_folder, tasks=inputs.tasks)
    router = router_of(classifier, TopK(route="top_k", k=params.k, weights="equal"))
    pool = {adapter.name: adapter for adapter in inputs.pool()}

    def build(route: Route, name: str) -> LoraAdapter:
        return fuse([pool[member] for member in sorted(route.adapters)], name=name)

    return System([], lambda _: router, build)


def _fixed(_: SystemParams, inputs: Inputs) -> System:
    (adapter,) = inputs.read([inputs.artifact])
    return System([adapter], lambda _: FixedRouter(adapter.name))


def _by_task(_: SystemParams, inputs: Inputs) -> System:
    return System(inputs.read(inputs.artifact / task for task in inputs.tasks), FixedRouter)


SYSTEMS: dict[str, Callable[[Any, Inputs], System]] = {
    "random": _by_text,
    "uniform": _by_text,
    "top_p": _by_text,
    "top_k": _by_text,
    "own_expert": _own_expert,
    "logo": _by_probe,
    "fusion": _fusion,
    "fixed": _fixed,
    "by_task": _by_task,  # told the task
}
