"""The engine that users load from a pipeline's folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dlplora.engine.routing import RequestRouter
from dlplora.engine.runner import Runner
from dlplora.errors import GenerationError, choices
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.lora.paging import check_limit
from dlplora.routing.base import Classifier
from dlplora.runtime import Place, best_place
from dlplora.systems.load import Systems


class Engine(Runner):
    """A runner over one or more systems of what a pipeline made.

    It answers until it is closed, by `close` or behind a `with` block; then the base model is as it
    was loaded.

    `version` is the registered model that it was loaded from, if it was. `classifiers` are what the
    routers of systems read their probabilities from, by the system's name; not all do.
    """

    version: str | None = None
    classifiers: Mapping[str, Classifier] = {}

    @classmethod
    def load(
        cls,
        folder: str | Path = "data",
        *,
        system: str | None = None,
        systems: Sequence[str] = (),
        place: Place | None = None,
        fallback_below: float | Literal["auto"] = "auto",
        log: str | Path | None = None,
        max_log_mib: float | None = None,
        adapter_mib: float | None = None,
        **settings: Any,
    ) -> "Engine":
        """Load systems of a folder: the base model, the adapters and routers that they name.

        Args:
            folder: The folder that the stages write to, or a model such as `.models/current`.
            system: A name in the params, with the task where it needs one (`single:TASK`); by
                default `default_system`.
            systems: Others that requests may name, over the same base model.
            place: Device and dtype; by default the best that this machine has.
            fallback_below: Routes of less confidence go to the base model instead; "auto" is the
                threshold that each system's router has from validation.
            log: A file that every decision is appended to; the params say what a line holds.
            max_log_mib: How large that file may grow before another one is begun.
            adapter_mib: How much memory each pool of plain adapters takes; those used least
                recently are copied in again when they are routed to. Fusion and Arrow are not
                limited. By default all adapters stay in memory.
            settings: Those of a `Runner`: max_batch_size, prefill_tokens, cache_mib,
                window_chars, language.

        Raises a `DlpLoraError` if anything in the folder cannot be used.
        """
        if adapter_mib is not None:
            check_limit(adapter_mib)
        loaded = Systems(folder, [system, *systems], place=place or best_place())
        names = dict.fromkeys([loaded.name(system), *systems])
        built = {name: loaded.named(name) for name in names}
        layers = FusedLayers(loaded.base.model)
        try:
            pools: dict[tuple[str, ...], Pool] = {}
            routers = {}
            for name, one in built.items():
                if one.pool.key not in pools:
                    pools[one.pool.key] = one.pool.start(layers, max_mib=adapter_mib)
                pool = pools[one.pool.key]
                one.pool.add_to(pool)
                routers[name] = RequestRouter(
                    loaded.base,
                    pool,
                    one.router,
                    one.policy,
                    fallback_below=one.threshold(fallback_below),
                    log=loaded.decision_log(log, name, one, max_mib=max_log_mib),
                )
            first = routers.pop(own := loaded.name(system))
            engine = cls(
                loaded.base,
                first.pool,
                router=first.router,
                policy=first.policy,
                fallback_below=first.fallback_below,
                log=first.log,
                name=own,
                systems=routers,
                **settings,
            )
        except BaseException:
            layers.unwrap()
            raise
        engine.version = loaded.version
        engine.classifiers = {
            name: one.classifier for name, one in built.items() if one.classifier is not None
        }
        return engine

    def fallback_of(self, system: str) -> float:
        """Return the confidence below which a system's routes go to the base model."""
        return self._named(system).fallback_below

    def runner_of(self, system: str, *, fallback_below: float | None = None) -> Runner:
        """Return what routes and scores by one of the systems, over the same layers.

        `fallback_below` replaces the system's own threshold.
        """
        router = self._named(system)
        return Runner(
            self.base,
            router.pool,
            router=router.router,
            policy=router.policy,
            name=system,
            fallback_below=router.fallback_below if fallback_below is None else fallback_below,
            log=router.log,
        )

    def probabilities(self, system: str, texts: Sequence[str]) -> list[dict[str, float] | None]:
        """Return the probability of each task for each text; None if the router has none."""
        self._named(system)
        if system not in self.classifiers:
            return [None] * len(texts)
        classifier = self.classifiers[system]
        return [
            dict(zip(classifier.labels, row, strict=True))
            for row in classifier.probabilities(texts).tolist()
        ]

    def _named(self, system: str) -> RequestRouter:
        if system not in self._routers:
            raise GenerationError(f"no system {system!r}; there are: {choices(self._routers)}")
        return self._routers[system]

    def close(self) -> None:
        """Take the adapters out of the base model; nothing is answered after that."""
        self.pool.layers.unwrap()
        self._cache.clear()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
