"""Prompts of a task that no adapter was trained for: does the router know that it does not know?"""

from collections.abc import Sequence

import numpy as np

from dlplora.records.novelty import Novelty
from dlplora.routing.base import Classifier

_KEPT = 0.95


def measure_novelty(classifier: Classifier, known: Sequence[str], unseen: Sequence[str]) -> Novelty:
    """Compare a classifier's confidence on known texts with that on texts of an unseen task."""
    from sklearn.metrics import roc_auc_score

    sure_known = classifier.probabilities(known).max(1)
    sure_unseen = classifier.probabilities(unseen).max(1)
    is_known = np.concatenate([np.ones(len(known)), np.zeros(len(unseen))])
    threshold = float(np.quantile(sure_known, 1 - _KEPT, method="lower"))
    return Novelty(
        num_known=len(known),
        num_unseen=len(unseen),
        auroc=float(roc_auc_score(is_known, np.concatenate([sure_known, sure_unseen]))),
        threshold=threshold,
        caught=float((sure_unseen < threshold).mean()),
    )
