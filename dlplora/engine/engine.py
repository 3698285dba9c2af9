"""The engine that users load from a pipeline's folder."""

from pathlib import Path
from typing import Any

from dlplora.adapters import read_adapter
from dlplora.engine.decisions import DecisionLog
from dlplora.engine.runner import Runner
from dlplora.errors import RouterError, choices
from dlplora.lora.attach import Pool
from dlplora.models import load_base
from dlplora.params import TopK, TopP
from dlplora.records.router_card import read_router_card
from dlplora.routing.build import load_classifier, router_of
from dlplora.runtime import Place, best_place

_USUAL = TopP(route="top_p", p=0.6, weights="renormalise")


class Engine(Runner):
    """A runner over what a pipeline made: its base model, its adapters and one of its routers."""

    @classmethod
    def load(
        cls,
        folder: str | Path = "data",
        *,
        router: str | None = None,
        selection: TopP | TopK = _USUAL,
        place: Place | None = None,
        log: str | Path | None = None,
        log_text: bool = False,
        **settings: Any,
    ) -> "Engine":
        """Load what a pipeline made: `base`, all `adapters` and one of `routers` of a folder.

        Args:
            folder: The folder that the stages write to.
            router: The name of a trained router; without one, requests bring their routes.
            selection: How the router's probabilities become a route; by default DLP-LoRA's top-p.
            place: Device and dtype; by default the best that this machine has.
            log: A file that every decision is appended to.
            log_text: Write the texts themselves to it, not their hashes.
            settings: Those of a `Runner`: places, fallback_below, window_chars,
                language.

        Raises a `DlpLoraError` if anything in the folder cannot be used.
        """
        folder = Path(folder)
        base = load_base(folder / "base", place=place or best_place(), attention="sdpa")
        pool = Pool(base.model)
        for adapter in sorted(folder.glob("adapters/*/adapter_config.json")):
            pool.add(read_adapter(adapter.parent, base_fingerprint=base.fingerprint))
        chosen = None
        if router is not None:
            names = sorted(path.parent.name for path in folder.glob("routers/*/router.json"))
            if router not in names:
                raise RouterError(f"{folder}: no router {router!r}; there are: {choices(names)}")
            place_of = folder / "routers" / router
            labels = read_router_card(place_of)["labels"]
            if missing := sorted(set(labels) - set(pool.names)):
                raise RouterError(
                    f"{place_of}: routes to {choices(missing)}; there are the adapters "
                    f"{choices(pool.names)}"
                )
            classifier = load_classifier(place_of, base=folder / "base", tasks=labels)
            chosen = router_of(classifier, selection)
        decisions = None if log is None else DecisionLog(log, with_text=log_text)
        return cls(base, pool, router=chosen, log=decisions, **settings)
