"""Confidence on known and unseen texts, counted pair by pair."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlplora.evaluation.novelty import measure_novelty
from dlplora.records.novelty import read_novelty, write_novelty
from dlplora.routing.base import Probabilities


class Told:
    """A classifier that is as sure as the text says, in percent."""

    labels = ("a", "b")

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        sure = np.array([int(text) / 100 for text in texts])
        return np.stack([sure, 1 - sure], 1)


PERCENT = st.lists(st.integers(50, 100), min_size=1, max_size=30)


@given(PERCENT, PERCENT)
def test_auroc_counts_the_pairs_in_which_the_known_text_is_surer(
    known: list[int], unseen: list[int]
) -> None:
    found = measure_novelty(Told(), [str(n) for n in known], [str(n) for n in unseen])
    pairs = [(k > u) + (k == u) / 2 for k in known for u in unseen]
    assert found.auroc == pytest.approx(sum(pairs) / len(pairs))
    assert np.mean([k / 100 >= found.threshold for k in known]) >= 0.95
    assert found.caught == np.mean([u / 100 < found.threshold for u in unseen])
    assert (found.num_known, found.num_unseen) == (len(known), len(unseen))


def test_what_was_measured_reads_back(tmp_path: Path) -> None:
    found = {"mlp": measure_novelty(Told(), ["90", "80"], ["70"])}
    write_novelty(tmp_path / "sums.json", found)
    assert read_novelty(tmp_path / "sums.json") == found
