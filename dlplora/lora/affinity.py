"""Which tasks change the base model alike: affinity of their adapters, and clusters by it.

Shapes: N adapters, r summed ranks of a layer.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dlplora.adapters import LoraAdapter
from dlplora.errors import ParamsError

Affinities = NDArray[np.float64]


def affinities(adapters: Sequence[LoraAdapter]) -> Affinities:
    """Return the cosine (N, N) of each two adapters' updates of all weights, ΔW = s B A.

    ΔW is never formed: ⟨B A, B' A'⟩ = Σ (Bᵀ B') ∘ (A A'ᵀ), whatever the ranks. Layers that one of
    two lacks count as unchanged by it.
    """
    products_NN = np.array([[_product(one, other) for other in adapters] for one in adapters])
    norms_N = np.sqrt(np.diag(products_NN))
    norms_N[norms_N == 0] = 1.0
    cosines_NN: Affinities = products_NN / np.outer(norms_N, norms_N)
    return cosines_NN


def _product(one: LoraAdapter, other: LoraAdapter) -> float:
    total = 0.0
    for path in sorted(one.pairs.keys() & other.pairs.keys()):
        ours, theirs = one.pairs[path], other.pairs[path]
        ups_rr = ours.up_OR.double().T @ theirs.up_OR.double()
        downs_rr = ours.down_RI.double() @ theirs.down_RI.double().T
        total += ours.scaling * theirs.scaling * float(torch.sum(ups_rr * downs_rr))
    return total


def find_clusters(
    names: Sequence[str], affinities_NN: Affinities, *, count: int
) -> list[list[str]]:
    """Group tasks into `count` clusters, by average linkage of 1 − affinity (scikit-learn).

    Each cluster and the list of them are in alphabetical order.
    """
    if not 1 <= count <= len(names):
        raise ParamsError(f"{count} clusters of {len(names)} tasks; expected 1 to {len(names)}")
    if count == len(names):
        return [[name] for name in sorted(names)]
    from sklearn.cluster import AgglomerativeClustering

    model = AgglomerativeClustering(n_clusters=count, metric="precomputed", linkage="average")
    labels = model.fit_predict(1 - affinities_NN)
    found = [
        sorted(name for name, label in zip(names, labels, strict=True) if label == number)
        for number in range(count)
    ]
    return sorted(found)
