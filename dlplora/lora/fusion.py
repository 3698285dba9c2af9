"""One adapter built of several: the average of their matrices.

Shapes: R rank, I inputs, O outputs.
"""

from collections.abc import Sequence

import torch

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import AdapterError
from dlplora.lora.attach import Pool, found, refuse_per_token
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import Row
from dlplora.lora.stacks import Resident
from dlplora.records.routes import Route

_KEPT = 64  # averages


class FusionPool(Pool):
    """A pool in which the adapters of a route become one: the average of their matrices.

    The averages used last are kept. Weights of routes are not looked at: all members count alike.
    """

    def __init__(self, layers: FusedLayers) -> None:
        super().__init__(layers)
        self._averages: dict[tuple[str, ...], Resident] = {}

    def _keep(self, adapter: LoraAdapter) -> LoraAdapter:
        self.layers.wrap(adapter)
        return adapter

    def _forget(self, name: str) -> None:
        self._averages = {}

    def row(self, route: Route) -> Row:
        """Take the average of a route's adapters; `RouterError` on one that is not here."""
        refuse_per_token(route)
        if not route.adapters:
            return ()
        names = tuple(sorted(route.adapters))
        with self._changing:  # else an average of earlier members might be kept
            average = self._averages.pop(names, None) or self._average(names)
            self._averages[names] = average
            if len(self._averages) > _KEPT:
                del self._averages[next(iter(self._averages))]
        return ((average, 1.0),)

    def _average(self, names: Sequence[str]) -> Resident:
        members = [found(self._adapters, name) for name in names]
        return self.layers.add(fuse(members, name=" + ".join(names)))


def fuse(adapters: Sequence[LoraAdapter], *, name: str) -> LoraAdapter:
    """Average the matrices A and B themselves of adapters, each with the same weight.

    LoraRetriever's fusion (arXiv 2402.09997, section 3.3): Δy = s · mean(B) mean(A) x, which is not
    the mean of the adapters' outputs. Raises `AdapterError` unless all change the same layers, by
    the same ranks and scalings.
    """
    first = adapters[0]
    for other in adapters[1:]:
        _check_alike(first, other)
    return LoraAdapter(
        name,
        {
            path: LoraPair(
                torch.stack([adapter.pairs[path].down_RI for adapter in adapters]).mean(0),
                torch.stack([adapter.pairs[path].up_OR for adapter in adapters]).mean(0),
                pair.scaling,
            )
            for path, pair in first.pairs.items()
        },
    )


def _check_alike(one: LoraAdapter, other: LoraAdapter) -> None:
    both = f"adapters {one.name!r} and {other.name!r} cannot be fused"
    if uneven := sorted(set(one.pairs) ^ set(other.pairs)):
        raise AdapterError(f"{both}: only one of them changes {uneven[0]}")
    for path, pair in one.pairs.items():
        ranks = len(pair.down_RI), len(other.pairs[path].down_RI)
        if ranks[0] != ranks[1]:
            raise AdapterError(f"{both}: their ranks at {path} are {ranks[0]} and {ranks[1]}")
        scalings = pair.scaling, other.pairs[path].scaling
        if scalings[0] != scalings[1]:
            raise AdapterError(
                f"{both}: their scalings at {path} are {scalings[0]:g} and {scalings[1]:g}"
            )
