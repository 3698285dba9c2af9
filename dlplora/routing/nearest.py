"""Routers that ask which router texts are nearest by embedding: k neighbours, and centroids.

Shapes: B texts, M router texts, N tasks, D dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dlplora.records.router_card import ROUTER_WEIGHTS, write_router_card
from dlplora.routing.base import Probabilities, Vectors
from dlplora.routing.embedding import Embedder
from dlplora.runtime import best_place


@dataclass(frozen=True)
class KnnClassifier:
    """The shares of each task among the k nearest router texts by cosine.

    `vectors_MD` have length 1; `targets_M` are places in `labels`.
    """

    embedder: Embedder
    labels: tuple[str, ...]
    vectors_MD: Vectors
    targets_M: NDArray[np.int64]
    neighbours: int

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Return the probability of each task (B, N)."""
        result: Probabilities = self._fitted.predict_proba(self.vectors(texts))
        return result

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return the embeddings of texts (B, D), of length 1."""
        return self.embedder.embed(texts, normalise=True)

    @cached_property
    def _fitted(self) -> Any:
        from sklearn.neighbors import KNeighborsClassifier

        return KNeighborsClassifier(
            n_neighbors=min(self.neighbours, len(self.vectors_MD)), algorithm="brute"
        ).fit(self.vectors_MD, self.targets_M)

    def save(self, folder: Path) -> None:
        """Write the vectors, router.json and the embedder."""
        save_file({"vectors": self.vectors_MD, "targets": self.targets_M}, folder / ROUTER_WEIGHTS)
        card = {"kind": "knn", "neighbours": self.neighbours}
        _write_card(folder, card, self)

    @classmethod
    def load(cls, folder: Path, card: Mapping[str, Any]) -> "KnnClassifier":
        """Read what `save` wrote beside its card."""
        tensors = load_file(folder / ROUTER_WEIGHTS)
        embedder = Embedder.load_beside(folder, card["embedder_sha256"], device=best_place().device)
        labels = tuple(card["labels"])
        return cls(embedder, labels, tensors["vectors"], tensors["targets"], card["neighbours"])


@dataclass(frozen=True)
class CentroidClassifier:
    """A softmax of the negative squared distances to each task's mean vector (N, D).

    The likeliest task is the one of the nearest centroid.
    """

    embedder: Embedder
    labels: tuple[str, ...]
    centroids_ND: Vectors
    temperature: float

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Return the probability of each task (B, N)."""
        from scipy.spatial.distance import cdist
        from scipy.special import softmax

        distances_BN = cdist(self.vectors(texts), self.centroids_ND, "sqeuclidean")
        result: Probabilities = softmax(-distances_BN / self.temperature, axis=1)
        return result

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return the embeddings of texts (B, D), of length 1."""
        return self.embedder.embed(texts, normalise=True)

    def save(self, folder: Path) -> None:
        """Write the centroids, router.json and the embedder."""
        save_file({"centroids": self.centroids_ND}, folder / ROUTER_WEIGHTS)
        card = {"kind": "centroid", "temperature": self.temperature}
        _write_card(folder, card, self)

    @classmethod
    def load(cls, folder: Path, card: Mapping[str, Any]) -> "CentroidClassifier":
        """Read what `save` wrote beside its card."""
        embedder = Embedder.load_beside(folder, card["embedder_sha256"], device=best_place().device)
        centroids_ND = load_file(folder / ROUTER_WEIGHTS)["centroids"]
        return cls(embedder, tuple(card["labels"]), centroids_ND, card["temperature"])


def fit_knn(
    embedder: Embedder, vectors_MD: Vectors, tasks: Sequence[str], *, neighbours: int
) -> KnnClassifier:
    """Remember the vectors of router texts, of length 1, with their tasks."""
    labels, targets_M = np.unique(list(tasks), return_inverse=True)
    return KnnClassifier(
        embedder, tuple(labels.tolist()), vectors_MD, targets_M.astype(np.int64), neighbours
    )


def fit_centroids(
    embedder: Embedder, vectors_MD: Vectors, tasks: Sequence[str], *, temperature: float
) -> CentroidClassifier:
    """Take the mean vector of each task's router texts."""
    labels, targets_M = np.unique(list(tasks), return_inverse=True)
    centroids_ND = np.stack(
        [vectors_MD[targets_M == target].mean(axis=0) for target in range(len(labels))]
    )
    return CentroidClassifier(embedder, tuple(labels.tolist()), centroids_ND, temperature)


def _write_card(
    folder: Path,
    card: Mapping[str, Any],
    classifier: KnnClassifier | CentroidClassifier,
) -> None:
    common = {
        "labels": list(classifier.labels),
        "base_fingerprint": None,
        "embedder_sha256": classifier.embedder.copy_beside(folder),
    }
    write_router_card(folder, {**card, **common})
