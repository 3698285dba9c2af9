"""One adapter built of several: the average of their matrices.

Shapes: R rank, I inputs, O outputs.
"""

from collections.abc import Sequence

import torch

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import AdapterError


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
