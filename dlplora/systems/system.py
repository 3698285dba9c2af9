"""What a system is, once it is built on a base model."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from dlplora.adapters import LoraAdapter, read_adapters
from dlplora.data.checksums import data_folder_sha256
from dlplora.engine.runner import Runner
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers, fused
from dlplora.lora.paging import PagedPool
from dlplora.models import Base
from dlplora.records.router_card import read_fallback
from dlplora.records.routes import Route
from dlplora.routing.base import Classifier, Probe, Router
from dlplora.routing.build import load_classifier
from dlplora.words import Policy


@dataclass(frozen=True)
class Inputs:
    """What a system may be built from: the loaded base model, folders, and the tasks to answer."""

    base: Base
    base_folder: Path
    adapters: Path
    artifact: Path
    router: Path
    tasks: Sequence[str]
    seed: int

    def pool(self) -> list[LoraAdapter]:
        """Read the adapters of all tasks."""
        return self.read(self.adapters / task for task in self.tasks)

    def read(self, folders: Iterable[Path]) -> list[LoraAdapter]:
        """Read adapters of the base model."""
        return read_adapters(folders, base_fingerprint=self.base.fingerprint)

    def classifier(self) -> Classifier:
        """Load the router; `RouterError` unless its labels are the tasks."""
        return load_classifier(self.router, base=self.base_folder, tasks=self.tasks)

    def fallback_below(self) -> float:
        """Read the confidence that the router's routes had better have."""
        return read_fallback(self.router)

    def sha256(self, entry: BaseModel) -> str:
        """Hash all that a system is made of, the base model apart: params, seed, tasks, files."""
        has_adapters = self.adapters != self.base_folder
        folders = [self.adapters / task for task in self.tasks] if has_adapters else []
        folders += [path for path in (self.artifact, self.router) if path != self.base_folder]
        files = [data_folder_sha256(folder) for folder in folders]
        told = [entry.model_dump(exclude={"settings"}), self.seed, list(self.tasks), files]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True)
class Pooled:
    """The adapters of a system, and the pool that they belong to.

    Systems of one `key`, whose adapters stem from one folder, can share a pool.
    """

    adapters: Sequence[LoraAdapter]
    key: tuple[str, ...]
    empty: Callable[[FusedLayers], Pool] = Pool

    def start(self, layers: FusedLayers, *, max_mib: float | None) -> Pool:
        """Make the pool without adapters; one that may page holds so many MiB of them at most."""
        if self.empty is Pool and max_mib is not None:
            return PagedPool(layers, max_mib=max_mib)
        return self.empty(layers)

    def make(self, layers: FusedLayers) -> Pool:
        """Make the pool on a model's fused layers."""
        pool = self.start(layers, max_mib=None)
        self.add_to(pool)
        return pool

    def add_to(self, pool: Pool) -> None:
        """Add the adapters that a pool of the same key has not yet."""
        for adapter in self.adapters:
            if adapter.name not in pool.names:
                pool.add(adapter)


def pooled(adapters: Sequence[LoraAdapter], *folders: Path, pool_type: type[Pool] = Pool) -> Pooled:
    """Return the pool of adapters that stem from folders."""
    return Pooled(adapters, (pool_type.__name__, *map(str, folders)), pool_type)


def not_told(_: Sequence[str]) -> tuple[Route, ...]:
    """Ignore the tasks of questions, as all systems do that choose by themselves."""
    return ()


@dataclass(frozen=True)
class System:
    """One way of answering.

    `pool` makes the pool in which routes become weighted adapters, on the fused layers of the base
    model. `router` chooses the routes of requests; a system that is told
    the task has none, and `told` gives the routes of questions by their tasks instead.
    `classifier` is what the router reads its probabilities from, if it does; routes of less
    confidence than `fallback_below` had better go to the base model. `policy` says when
    requests that name none are routed again. `sha256` hashes all that the system is made of, the
    base model apart.
    """

    base: Base
    pool: Pooled
    router: Router | Probe | None = None
    told: Callable[[Sequence[str]], tuple[Route, ...]] = not_told
    classifier: Classifier | None = None
    policy: Policy = "route_once"
    fallback_below: float = 0.0
    sha256: Callable[[], str] = lambda: ""

    def threshold(self, told: float | Literal["auto"]) -> float:
        """Return the confidence below which the base model answers: "auto" is the router's own."""
        return self.fallback_below if told == "auto" else told

    def probabilities(self, text: str) -> dict[str, float] | None:
        """Return the probability of each task for a text, if the router has probabilities."""
        if self.classifier is None:
            return None
        (row,) = self.classifier.probabilities([text])
        return dict(zip(self.classifier.labels, row.tolist(), strict=True))

    @contextmanager
    def running(self, **settings: Any) -> Iterator[Runner]:
        """Yield what answers requests, for the time of a `with` block; `settings` of a `Runner`."""
        with fused(self.base.model) as layers:
            pool = self.pool.make(layers)
            yield Runner(self.base, pool, router=self.router, policy=self.policy, **settings)
