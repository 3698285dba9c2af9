"""Routers that learn nothing or little: constant, random, and TF-IDF."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dlplora.data.scripts import terms_of
from dlplora.records.router_card import ROUTER_WEIGHTS, write_router_card
from dlplora.records.routes import Route
from dlplora.routing.base import Probabilities, Vectors


@dataclass(frozen=True)
class ConstantRouter:
    """One route for every text: of the base model, of one adapter, of all with equal weights."""

    constant: Route

    def route(self, texts: Sequence[str]) -> list[Route]:
        """Return one route for each text."""
        return [self.constant] * len(texts)


@dataclass(frozen=True)
class RandomRouter:
    """One adapter for each text, drawn by the seed and the text: order does not matter."""

    labels: tuple[str, ...]
    seed: int

    def route(self, texts: Sequence[str]) -> list[Route]:
        """Return one route for each text."""
        return [Route((self.labels[self._draw(text)],), (1.0,)) for text in texts]

    def _draw(self, text: str) -> int:
        digest = hashlib.sha256(f"{self.seed}\0{text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % len(self.labels)


@dataclass(frozen=True)
class TfidfClassifier:
    """Words and word pairs, weighed by TF-IDF, under a logistic regression.

    `coefficients` are (N, terms), `intercepts` (N,), `idf` (terms,).
    """

    labels: tuple[str, ...]
    terms: tuple[str, ...]
    idf: NDArray[np.float64]
    coefficients: NDArray[np.float64]
    intercepts: NDArray[np.float64]

    @property
    def num_parameters(self) -> int:
        """How many numbers were fitted."""
        return self.coefficients.size + self.intercepts.size

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Return the probability of each task (B, N)."""
        from scipy.special import softmax

        result: Probabilities = softmax(self._logits(texts), axis=1)
        return result

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return the logits (B, N): shorter than a place for each term."""
        return self._logits(texts).astype(np.float32)

    def _logits(self, texts: Sequence[str]) -> NDArray[np.float64]:
        logits_BN: NDArray[np.float64] = (
            self._fitted.transform(texts) @ self.coefficients.T + self.intercepts
        )
        return logits_BN

    @cached_property
    def _fitted(self) -> Any:
        return _vectoriser(self.terms, self.idf)

    def save(self, folder: Path) -> None:
        """Write router.safetensors and router.json."""
        tensors = {
            "idf": self.idf,
            "coefficients": self.coefficients,
            "intercepts": self.intercepts,
        }
        save_file(tensors, folder / ROUTER_WEIGHTS)
        card = {
            "kind": "tfidf",
            "labels": list(self.labels),
            "base_fingerprint": None,
            "terms": list(self.terms),
        }
        write_router_card(folder, card)

    @classmethod
    def load(cls, folder: Path, card: Mapping[str, Any]) -> "TfidfClassifier":
        """Read what `save` wrote beside its card."""
        tensors = load_file(folder / ROUTER_WEIGHTS)
        return cls(labels=tuple(card["labels"]), terms=tuple(card["terms"]), **tensors)


def fit_tfidf(
    texts: Sequence[str], tasks: Sequence[str], *, regularisation: float
) -> TfidfClassifier:
    """Fit on texts with their tasks; `regularisation` is scikit-learn's C."""
    from sklearn.linear_model import LogisticRegression

    vectoriser = _vectoriser(None, None)
    features = vectoriser.fit_transform(texts)
    labels = sorted(set(tasks))
    if len(labels) == 1:  # nothing to tell apart
        coefficients, intercepts = np.zeros((1, features.shape[1])), np.zeros(1)
    else:
        model = LogisticRegression(C=regularisation, max_iter=1000).fit(features, tasks)
        coefficients, intercepts = model.coef_, model.intercept_
    if len(labels) == 2:  # scikit-learn keeps one row for two classes: p = sigmoid(x w)
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    return TfidfClassifier(
        labels=tuple(labels),
        terms=tuple(vectoriser.get_feature_names_out()),
        idf=vectoriser.idf_,
        coefficients=np.ascontiguousarray(coefficients),  # safetensors keeps no strides
        intercepts=intercepts,
    )


def _vectoriser(terms: Sequence[str] | None, idf: NDArray[np.float64] | None):  # type: ignore[no-untyped-def]
    """Build scikit-learn's vectoriser, fitted if terms and idf are given."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer(
        ngram_range=(1, 2),
        sublinear_tf=True,
        tokenizer=terms_of,
        token_pattern=None,  # else it warns that it does not use its own
        vocabulary=terms,
    )
    if idf is not None:
        vectoriser.idf_ = idf
    return vectoriser
