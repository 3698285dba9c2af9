"""Routers over an embedder's vectors: an index of adapters, neighbours or centroids, measured."""

from collections.abc import Sequence
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


def make_embedding_router(
    params: EmbeddingRouter,
    *,
    embedder_folder: Path,
    indexes: Path,
    tasks: Sequence[str],
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    no_task: Sequence[str],
    index: Index,
    place: Place,
    advance: Advance,
) -> TrainedRouter:
    """Make the kind of router that the params name; nothing is trained by gradients.

    It is made of an embedder and the indexes of the pool's tasks, or of labelled texts. Texts of
    `no_task` say from which confidence on it is to be believed.

    `advance(n)` is called after each n training texts, by routers that embed them.
    """
    embedder = Embedder.load(embedder_folder, device=place.device)
    classifier: Retriever | KnnClassifier | CentroidClassifier
    if isinstance(params, KnnRouter | CentroidRouter):
        vectors_MD = embedder.embed([row.text for row in train], normalise=True, advance=advance)
        tasks_M = [row.task for row in train]
        if isinstance(params, KnnRouter):
            classifier = fit_knn(embedder, vectors_MD, tasks_M, neighbours=params.neighbours)
        else:
            classifier = fit_centroids(
                embedder, vectors_MD, tasks_M, temperature=params.temperature
            )
    else:
        labels = tuple(sorted(tasks))
        classifier = Retriever(
            embedder,
            labels,
            read_indexes(indexes, labels, embedder=embedder_folder.name),
            instruction=index.instruction,
            similarity=params.similarity,
            temperature=params.temperature,
        )
    num_parameters = sum(parameter.numel() for parameter in embedder.model.parameters())
    quality = measure(classifier, validation, num_parameters, no_task=no_task)
    return TrainedRouter(classifier, classifier.save, quality, None)
