"""Arrow: adapters weighted for each token on each layer, by PEFT's own forward pass.

A layer's prototype of an adapter is the top right singular vector of its B A; a token's weights
are the softmax of |prototype · x| over the `top_k` largest (arXiv 2405.11157, section 4).
"""

from collections.abc import Sequence
from pathlib import Path

from peft import ArrowConfig, create_arrow_model

from dlplora.adapters import read_adapters
from dlplora.errors import AdapterError, RouterError, one_line
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers, set_module
from dlplora.lora.mix import OwnLayers, Row
from dlplora.models import Base
from dlplora.params.systems import ArrowSystem
from dlplora.records.routes import PER_TOKEN, Route
from dlplora.routing.simple import ConstantRouter
from dlplora.systems.system import Inputs, Pooled, System
from dlplora.training.merging import check_alike
from dlplora.training.warnings import ignore_peft_warnings

_ROUTER = ".lora_arrow.arrow_router"


def build_arrow(entry: ArrowSystem, inputs: Inputs) -> System:
    """Build the system of all adapters, weighted token by token."""
    folders = [inputs.adapters / task for task in inputs.tasks]
    layers = arrow_layers(inputs.base, folders, entry=entry, seed=inputs.seed)
    return System(
        inputs.base,
        Pooled([], ("arrow", str(id(layers))), lambda fused: ArrowPool(fused, layers)),
        router=ConstantRouter(PER_TOKEN),
    )


class ArrowPool(Pool):
    """A pool without adapters of its own: PEFT's layers weigh theirs for every token."""

    def __init__(self, layers: FusedLayers, own: OwnLayers) -> None:
        super().__init__(layers)
        layers.wrap_own(own)
        self._own = own

    def row(self, route: Route) -> Row:
        """Take PEFT's layers; `RouterError` on a route that names adapters."""
        if not route.per_token:
            raise RouterError("Arrow weighs all adapters for each token: it takes no other routes")
        return self._own


def arrow_layers(
    base: Base, folders: Sequence[Path], *, entry: ArrowSystem, seed: int
) -> OwnLayers:
    """Make PEFT's layers for those of the base model that the adapters change.

    Of fewer adapters than `top_k` all are weighted. The seed draws where the search for singular
    vectors begins. Raises `AdapterError` if the adapters do not fit the base model or differ in
    layers or ranks, or if PEFT refuses them. The base model is left as it was in any case.
    """
    adapters = read_adapters(folders, base_fingerprint=base.fingerprint)
    check_alike(adapters, title="arrow")
    config = ArrowConfig(
        top_k=min(entry.top_k, len(folders)),
        router_temperature=entry.temperature,
        rng_seed=seed,
    )
    own, attributes = dict(base.model.named_modules()), set(vars(base.model))
    try:
        try:
            with ignore_peft_warnings():
                create_arrow_model(base.model, [str(folder) for folder in folders], config)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"arrow: {one_line(error)}") from error
        base.model.requires_grad_(False).train(False)
        weighted = {
            name.removesuffix(_ROUTER)
            for name, _ in base.model.named_modules()
            if name.endswith(_ROUTER)
        }
        if odd := sorted(weighted ^ adapters[0].pairs.keys()):
            raise AdapterError(
                f"arrow: PEFT weighs other layers than the adapters', such as {odd[0]}"
            )
        return OwnLayers({path: base.model.get_submodule(path) for path in weighted})
    finally:
        for path, module in own.items():
            if base.model.get_submodule(path) is not module:
                set_module(base.model, path, module)
        for name in vars(base.model).keys() - attributes:  # PEFT's own, read by the next one
            delattr(base.model, name)
