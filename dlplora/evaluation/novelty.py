"""Texts that no adapter was trained for: does the router know that it does not know?"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlplora.data.ingest import ingest
from dlplora.data.wordings import read_no_task
from dlplora.params.inputs import Splits, UnseenTask
from dlplora.records.novelty import Novelty
from dlplora.routing.base import Classifier


def unseen_texts(raw: Path, name: str, unseen: UnseenTask, splits: Splits) -> list[str]:
    """Read the test questions of an unseen task, or the test texts of a YAML file of no task.

    Raises a `DlpLoraError` if the file cannot be used.
    """
    if raw.suffix == ".yaml":
        return read_no_task(raw).test
    keys, on_bad_row = unseen.keys, unseen.on_bad_row
    found = ingest(raw, name, keys=keys, on_bad_row=on_bad_row, splits=splits, limit=None)
    return [example.question for example in found.examples["test"]]


def measure_novelty(
    classifier: Classifier, known: Sequence[str], unseen: Sequence[str], *, threshold: float
) -> Novelty:
    """Compare a classifier's confidence in known texts with that in unseen ones."""
    from sklearn.metrics import roc_auc_score

    sure_known = classifier.probabilities(known).max(1)
    sure_unseen = classifier.probabilities(unseen).max(1)
    is_known = np.concatenate([np.ones(len(known)), np.zeros(len(unseen))])
    return Novelty(
        num_known=len(known),
        num_unseen=len(unseen),
        auroc=float(roc_auc_score(is_known, np.concatenate([sure_known, sure_unseen]))),
        threshold=threshold,
        kept=float((sure_known >= threshold).mean()),
        refused=float((sure_unseen < threshold).mean()),
    )
