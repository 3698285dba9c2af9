"""Neighbours counted one by one, and centroids beside scikit-learn's."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import NearestCentroid

from dlplora.routing.embedding import unit
from dlplora.routing.nearest import CentroidClassifier, KnnClassifier, fit_centroids, fit_knn
from tests.embedders import TASKS_OF_TEXTS, ToldEmbedder, check_saved_router, tiny_embedder

RNG = np.random.default_rng(0)
TASKS = [str(task) for task in RNG.choice(["a", "b", "c"], 60)]
KNOWN = unit(
    np.array([(ord(task) - 98, 1, 0) for task in TASKS]) + RNG.normal(size=(60, 3))
).astype(np.float32)
ASKED = {f"text {number}": vector for number, vector in enumerate(RNG.normal(size=(30, 3)))}
TOLD = ToldEmbedder({text: vector.tolist() for text, vector in ASKED.items()})
TEXTS = list(ASKED)


@pytest.mark.parametrize("neighbours", [1, 5, 60, 99])
def test_neighbours_vote_by_cosine(neighbours: int) -> None:
    found = fit_knn(TOLD, KNOWN, TASKS, neighbours=neighbours).probabilities(TEXTS)

    for row, vector in zip(found, ASKED.values(), strict=True):
        nearest = np.argsort(-(KNOWN @ vector))[:neighbours]
        votes = Counter(TASKS[place] for place in nearest)
        shares = [votes[task] / len(nearest) for task in ("a", "b", "c")]
        np.testing.assert_allclose(row, shares)


def test_the_likeliest_task_is_of_scikit_learns_nearest_centroid() -> None:
    classifier = fit_centroids(TOLD, KNOWN, TASKS, temperature=0.3)

    found = classifier.probabilities(TEXTS)

    reference = NearestCentroid().fit(KNOWN, TASKS)
    vectors = TOLD.embed(TEXTS, normalise=True)
    chosen = [classifier.labels[place] for place in found.argmax(1)]
    assert chosen == reference.predict(vectors).tolist()
    assert len(set(chosen)) == 3
    squares = [[((v - c) ** 2).sum() for c in reference.centroids_] for v in vectors]
    exponentials = np.exp(-np.array(squares) / 0.3)
    np.testing.assert_allclose(found, exponentials / exponentials.sum(1, keepdims=True), rtol=1e-4)


def test_the_order_of_router_texts_does_not_matter() -> None:
    order = RNG.permutation(len(TASKS))
    turned = [TASKS[row] for row in order]

    knn = [
        fit_knn(TOLD, vectors, tasks, neighbours=5).probabilities(TEXTS)
        for vectors, tasks in ((KNOWN, TASKS), (KNOWN[order], turned))
    ]
    centroid = [
        fit_centroids(TOLD, vectors, tasks, temperature=1.0).probabilities(TEXTS)
        for vectors, tasks in ((KNOWN, TASKS), (KNOWN[order], turned))
    ]

    np.testing.assert_allclose(*knn)
    np.testing.assert_allclose(*centroid, rtol=1e-5)


def test_one_task_is_always_chosen() -> None:
    for classifier in (
        fit_knn(TOLD, KNOWN, ["a"] * 60, neighbours=5),
        fit_centroids(TOLD, KNOWN, ["a"] * 60, temperature=1.0),
    ):
        assert classifier.labels == ("a",)
        assert np.array_equal(classifier.probabilities(TEXTS), np.ones((30, 1)))


@pytest.mark.parametrize("kind", ["knn", "centroid"])
def test_a_saved_router_is_whole(kind: str, tmp_path: Path) -> None:
    embedder, vectors = tiny_embedder(tmp_path / "embedder")
    made: KnnClassifier | CentroidClassifier = (
        fit_knn(embedder, vectors, TASKS_OF_TEXTS, neighbours=2)
        if kind == "knn"
        else fit_centroids(embedder, vectors, TASKS_OF_TEXTS, temperature=0.1)
    )
    check_saved_router(made, tmp_path)
