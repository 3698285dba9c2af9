"""What a router is, and how its probabilities become a route.

Shapes: B texts, N tasks, I inputs of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dlplora.params.systems import TopK, TopP, Weighting
from dlplora.records.routes import Route

Probabilities = NDArray[np.float64]
Vectors = NDArray[np.float32]
_CALIBRATION_BINS = 15
_LOG_TEMPERATURES = (-6.0, 3.0)
_STRANGE_SHARE = 0.03  # of texts of no task in the calibration (docs/log.md)
_ASKED_SHARE = 0.1  # of texts of no task in what people type, as a threshold assumes


class Router(Protocol):
    """Texts → routes."""

    def route(self, texts: Sequence[str]) -> list[Route]:
        """Return one route for each text, by the text alone."""


@runtime_checkable
class Probe(Protocol):
    """What the base model makes of prompts → routes: for routers that read no text themselves."""

    @property
    def path(self) -> str:
        """The layer whose input at a prompt's last token is asked for."""

    def routes(self, inputs_BI: Tensor) -> list[Route]:
        """Return one route for each prompt, by that input alone."""


class Classifier(Protocol):
    """Texts → probabilities of tasks."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The tasks, in the order of the columns of `probabilities`."""

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Return the probability of each task (B, N); rows sum to 1."""

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors (B, D) of texts by which the tasks are told apart."""


@dataclass(frozen=True)
class ClassifierRouter:
    """A router that keeps the likeliest tasks of a classifier and weighs their adapters."""

    classifier: Classifier
    selection: TopP | TopK

    def route(self, texts: Sequence[str]) -> list[Route]:
        """Return one route for each text."""
        return [
            select(row, self.classifier.labels, self.selection)
            for row in self.classifier.probabilities(texts)
        ]


def select(probabilities: Probabilities, labels: Sequence[str], how: TopP | TopK) -> Route:
    """Turn the probabilities of one text (N,) into its route; equal ones keep label order."""
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    num_kept = nucleus_size(ranked, how.p) if isinstance(how, TopP) else min(how.k, len(ranked))
    weights = weigh(ranked[:num_kept], how.weights)
    return Route(
        adapters=tuple(labels[place] for place in order[:num_kept]),
        weights=tuple(weights.tolist()),
        confidence=float(ranked[0]),
    )


def nucleus_size(ranked: Probabilities, p: float) -> int:
    """Return how many of the ranked probabilities (N,) make the smallest set that reaches `p`.

    DLP-LoRA's top-p (arXiv 2410.01497, section 3): at least one is kept.
    """
    reached = np.cumsum(ranked) >= p - 1e-9
    return int(np.argmax(reached)) + 1 if reached.any() else len(ranked)


def weigh(kept: Probabilities, weighting: Weighting) -> Probabilities:
    """Turn the probabilities of the kept tasks (K,) into weights that sum to 1.

    `renormalise` divides by their sum. `softmax_probabilities` takes a softmax of the
    probabilities, as DLP-LoRA's paper and code do. `softmax_logits` takes it of the logits
    log p, which gives the same weights as `renormalise`, by another path of rounding. `equal`
    asks only for their number.
    """
    if weighting == "equal":
        kept = np.ones_like(kept)
    elif weighting == "softmax_probabilities":
        kept = np.exp(kept - kept.max())
    elif weighting == "softmax_logits":
        logits = np.log(np.maximum(kept, np.finfo(np.float64).tiny))
        kept = np.exp(logits - logits.max())
    weights: Probabilities = kept / kept.sum()
    return weights


def calibration_error(confidence: Probabilities, right: NDArray[np.bool_]) -> float:
    """Return the expected calibration error of B texts: |accuracy − confidence| over 15 bins."""
    bins = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    gaps = [
        abs(right[bins == number].mean() - confidence[bins == number].mean())
        * (bins == number).mean()
        for number in np.unique(bins)
    ]
    return float(sum(gaps))


def fallback_threshold(
    confidence_B: Probabilities, right_B: NDArray[np.bool_], strange_M: Probabilities
) -> float:
    """Return the confidence below which the base model had better answer.

    It is chosen on the confidence in B held-out texts of the tasks – some of which are routed to
    the right one – and in M texts of no task, as if one text in ten were of no task: the most texts
    then go where they belong. Of equally good thresholds it is the lowest.
    """
    ranked = np.unique(np.concatenate([confidence_B, strange_M, [1.0]]))
    thresholds_T = np.concatenate([[0.0], (ranked[1:] + ranked[:-1]) / 2])
    kept_T = (right_B[:, None] & (confidence_B[:, None] >= thresholds_T)).mean(0)
    refused_T = (strange_M[:, None] < thresholds_T).mean(0)
    good_T = (1 - _ASKED_SHARE) * kept_T + _ASKED_SHARE * refused_T
    return float(thresholds_T[good_T.argmax()])


def softmax(scores_BN: Probabilities) -> Probabilities:
    """Return the probabilities of tasks (B, N) by their scores."""
    from scipy.special import softmax as scipy_softmax

    probabilities_BN: Probabilities = scipy_softmax(scores_BN, axis=1)
    return probabilities_BN


def fit_temperature(
    scores_BN: Probabilities, targets_B: Sequence[int], strange_MN: Probabilities
) -> float:
    """Return the temperature under whose softmax the true tasks of held-out texts are likeliest.

    M texts of no task count a little, and are to get all tasks alike: without them held-out texts
    that are all routed rightly would make the router sure of everything.

    Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 4.2; uniform
    targets as in Hendrycks et al., "Deep Anomaly Detection with Outlier Exposure" (arXiv
    1812.04606), section 3.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        logs_BN, logs_MN = (
            log_softmax(scores / np.exp(log_temperature), axis=1)
            for scores in (scores_BN, strange_MN)
        )
        known = logs_BN[np.arange(len(targets_B)), targets_B].mean()
        return -float((1 - _STRANGE_SHARE) * known + _STRANGE_SHARE * logs_MN.mean())

    return float(np.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded").x))
