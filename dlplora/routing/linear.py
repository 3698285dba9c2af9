"""Routers that are linear over the vectors of a sentence embedder.

Shapes: B texts, N tasks, D dimensions, M training texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dlplora.records.router_card import ROUTER_WEIGHTS, write_router_card
from dlplora.routing.base import Probabilities, Vectors, fit_temperature, softmax
from dlplora.routing.embedding import Embedder
from dlplora.runtime import best_place


@dataclass(frozen=True)
class LinearClassifier:
    """A softmax of linear scores of a text's vector over a temperature.

    `coefficients_ND` and `intercepts_N` are those of a logistic or a ridge regression.
    """

    kind: Literal["logistic", "ridge"]
    embedder: Embedder
    labels: tuple[str, ...]
    coefficients_ND: NDArray[np.float64]
    intercepts_N: NDArray[np.float64]
    temperature: float = 1.0

    @property
    def num_parameters(self) -> int:
        """How many numbers were fitted."""
        return self.coefficients_ND.size + self.intercepts_N.size

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Return the probability of each task (B, N)."""
        return softmax(self._scores(self.vectors(texts)) / self.temperature)

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return the embeddings of texts (B, D), of length 1."""
        return self.embedder.embed(texts, normalise=True)

    def calibrated(
        self, texts: Sequence[str], tasks: Sequence[str], *, strange: Sequence[str]
    ) -> "LinearClassifier":
        """Return the same with the temperature that held-out texts and texts of no task choose."""
        targets_B = [self.labels.index(task) for task in tasks]
        scores_BN = self._scores(self.vectors(texts))
        return replace(
            self,
            temperature=fit_temperature(scores_BN, targets_B, self._scores(self.vectors(strange))),
        )

    def _scores(self, vectors_BD: Vectors) -> NDArray[np.float64]:
        scores_BN: NDArray[np.float64] = vectors_BD @ self.coefficients_ND.T + self.intercepts_N
        return scores_BN

    def save(self, folder: Path) -> None:
        """Write the coefficients, router.json and the embedder."""
        tensors = {"coefficients": self.coefficients_ND, "intercepts": self.intercepts_N}
        save_file(tensors, folder / ROUTER_WEIGHTS)
        card = {
            "kind": self.kind,
            "labels": list(self.labels),
            "base_fingerprint": None,
            "embedder_sha256": self.embedder.copy_beside(folder),
            "temperature": self.temperature,
        }
        write_router_card(folder, card)

    @classmethod
    def load(cls, folder: Path, card: Mapping[str, Any]) -> "LinearClassifier":
        """Read what `save` wrote beside its card."""
        tensors = load_file(folder / ROUTER_WEIGHTS)
        embedder = Embedder.load_beside(folder, card["embedder_sha256"], device=best_place().device)
        return cls(
            kind=card["kind"],
            embedder=embedder,
            labels=tuple(card["labels"]),
            coefficients_ND=tensors["coefficients"],
            intercepts_N=tensors["intercepts"],
            temperature=card["temperature"],
        )


def fit_linear(
    kind: Literal["logistic", "ridge"],
    embedder: Embedder,
    vectors_MD: Vectors,
    tasks: Sequence[str],
    *,
    regularisation: float,
) -> LinearClassifier:
    """Fit a linear classifier on the vectors of texts with their tasks.

    `regularisation` is scikit-learn's `C` of a logistic regression, its `alpha` of a ridge
    regression in closed form onto 0 and 1, where every task counts alike.
    """
    from sklearn.linear_model import LogisticRegression, RidgeClassifier

    labels, targets_M = np.unique(list(tasks), return_inverse=True)
    if len(labels) == 1:  # nothing to tell apart
        coefficients_ND, intercepts_N = np.zeros((1, vectors_MD.shape[1])), np.zeros(1)
    else:
        model = (
            LogisticRegression(C=regularisation, max_iter=1000)
            if kind == "logistic"
            else RidgeClassifier(alpha=regularisation, class_weight="balanced", solver="cholesky")
        ).fit(vectors_MD.astype(np.float64), targets_M)
        coefficients_ND = np.atleast_2d(model.coef_)
        intercepts_N = np.atleast_1d(model.intercept_)
    if len(labels) == 2:  # scikit-learn keeps one row for two classes
        coefficients_ND = np.concatenate([-coefficients_ND, coefficients_ND]) / 2
        intercepts_N = np.concatenate([-intercepts_N, intercepts_N]) / 2
    return LinearClassifier(
        kind=kind,
        embedder=embedder,
        labels=tuple(labels.tolist()),
        coefficients_ND=np.ascontiguousarray(coefficients_ND),
        intercepts_N=np.ascontiguousarray(intercepts_N),
    )
