"""From the folder of a trained router to its classifier: the look-up table of kinds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlplora.errors import RouterError, choices
from dlplora.params.systems import TopK, TopP
from dlplora.records.base_card import read_base_card
from dlplora.records.router_card import read_router_card
from dlplora.routing.base import Classifier, ClassifierRouter, Router
from dlplora.routing.encoder import EncoderClassifier
from dlplora.routing.ensemble import EnsembleClassifier
from dlplora.routing.linear import LinearClassifier
from dlplora.routing.mlp import MlpClassifier
from dlplora.routing.nearest import CentroidClassifier, KnnClassifier
from dlplora.routing.retriever import RetrievalRouter, Retriever
from dlplora.routing.simple import TfidfClassifier

CLASSIFIERS: dict[str, Callable[[Path, Mapping[str, Any], Path], Classifier]] = {
    "mlp": lambda folder, card, base: MlpClassifier.load(folder, card, base=base),
    "encoder": lambda folder, card, _: EncoderClassifier.load(folder, card),
    "tfidf": lambda folder, card, _: TfidfClassifier.load(folder, card),
    "retriever": lambda folder, card, _: Retriever.load(folder, card),
    "knn": lambda folder, card, _: KnnClassifier.load(folder, card),
    "centroid": lambda folder, card, _: CentroidClassifier.load(folder, card),
    "ensemble": lambda folder, card, _: EnsembleClassifier.load(folder),
    "logistic": lambda folder, card, _: LinearClassifier.load(folder, card),
    "ridge": lambda folder, card, _: LinearClassifier.load(folder, card),
}


def load_classifier(folder: Path, *, base: Path, tasks: Sequence[str]) -> Classifier:
    """Load a trained router's classifier; its labels must be the tasks of the pool."""
    card = read_router_card(folder)
    kind, fingerprint = card["kind"], card["base_fingerprint"]
    if kind not in CLASSIFIERS:
        raise RouterError(f"{folder}: a router of kind {kind!r}; there are: {choices(CLASSIFIERS)}")
    found = read_base_card(base).fingerprint
    if fingerprint is not None and fingerprint != found:
        raise RouterError(
            f"{folder}: trained for the base model {fingerprint[:12]}, the one here is {found[:12]}"
        )
    classifier = CLASSIFIERS[kind](folder, card, base)
    new, gone = set(tasks) - set(classifier.labels), set(classifier.labels) - set(tasks)
    told = [f"not trained for {choices(new)}"] if new else []
    told += [f"trained for {choices(gone)}, which the pool lacks"] if gone else []
    if told:
        raise RouterError(f"{folder}: {'; '.join(told)}; `dlplora repro` brings it up to date")
    return classifier


def router_of(classifier: Classifier, selection: TopP | TopK) -> Router:
    """Return the router that keeps the likeliest tasks of a classifier, or the most similar."""
    if isinstance(classifier, Retriever):
        return RetrievalRouter(classifier, selection)
    return ClassifierRouter(classifier, selection)
