"""Routers over an embedder's vectors: an index of adapters, neighbours or centroids, measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dlplora.data.balance import Labelled
from dlplora.params.routing import CentroidRouter, EmbeddingRouter, Index, KnnRouter
from dlplora.routing.embedding import Embedder
from dlplora.routing.nearest import (
    CentroidClassifier,
    KnnClassifier,
    fit_centroids,
    fit_knn,
)
from dlplora.routing.retriever import Retriever, read_indexes
from dlplora.runtime import Place
from dlplora.training.router import TrainedRouter, measure
from dlplora.words import Advance


@dataclass(frozen=True)
class EmbeddingRouterInputs:
    """What these routers are made of: folders, the tasks of the pool, and router texts."""

    embedder: Path
    indexes: Path
    tasks: Sequence[str]
    train: Sequence[Labelled]
    validation: Sequence[Labelled]


def make_embedding_router(
    inputs: EmbeddingRouterInputs,
    params: EmbeddingRouter,
    *,
    index: Index,
    place: Place,
    advance: Advance,
) -> TrainedRouter:
    """Make the kind of router that the params name; nothing is trained by gradients.

    `advance(n)` is called after each n training texts, by routers that embed them.
    """
    embedder = Embedder.load(inputs.embedder, device=place.device)
    if isinstance(params, KnnRouter | CentroidRouter):
        classifier: Retriever | KnnClassifier | CentroidClassifier = _nearest(
            embedder, inputs.train, params, advance
        )
    else:
        labels = tuple(sorted(inputs.tasks))
        classifier = Retriever(
            embedder,
            labels,
            read_indexes(inputs.indexes, labels, embedder=inputs.embedder.name),
            instruction=index.instruction,
            similarity=params.similarity,
            temperature=params.temperature,
        )
    return TrainedRouter(
        classifier,
        classifier.save,
        measure(classifier, inputs.validation, embedder.num_parameters),
        None,
    )


def _nearest(
    embedder: Embedder,
    train: Sequence[Labelled],
    params: KnnRouter | CentroidRouter,
    advance: Advance,
) -> KnnClassifier | CentroidClassifier:
    vectors_MD = embedder.embed([row.text for row in train], normalise=True, advance=advance)
    tasks = [row.task for row in train]
    if isinstance(params, KnnRouter):
        return fit_knn(embedder, vectors_MD, tasks, neighbours=params.neighbours)
    return fit_centroids(embedder, vectors_MD, tasks, temperature=params.temperature)
