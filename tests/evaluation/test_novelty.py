"""Confidence on known and unseen texts, counted pair by pair."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dlplora.evaluation.novelty import measure_novelty, unseen_texts
from dlplora.params.inputs import Splits, UnseenTask
from dlplora.records.novelty import read_novelty, write_novelty
from dlplora.routing.base import Probabilities
from tests.tiny import opposites, write_raw


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
    texts = [str(n) for n in known], [str(n) for n in unseen]
    found = measure_novelty(Told(), *texts, threshold=0.75)
    pairs = [(k > u) + (k == u) / 2 for k in known for u in unseen]
    assert found.auroc == pytest.approx(sum(pairs) / len(pairs))
    assert found.kept == np.mean([k >= 75 for k in known])
    assert found.refused == np.mean([u < 75 for u in unseen])
    assert found.threshold == 0.75
    assert (found.num_known, found.num_unseen) == (len(known), len(unseen))


def test_unseen_texts_are_a_tasks_test_questions_or_a_files_test_texts(tmp_path: Path) -> None:
    splits = Splits(train=30, validation=5, test=10, shares=(0.5, 0.2, 0.3), least=(4, 1, 1))
    unseen = UnseenTask(raw="x", keys="auto", on_bad_row="refuse")
    write_raw(tmp_path / "sums.json", opposites(40))
    found = unseen_texts(tmp_path / "sums.json", "sums", unseen, splits)
    assert 0 < len(found) <= 10
    assert set(found) < {row["Q"] for row in opposites(40)}
    texts = {"validation": ["a poem"], "test": ["good day", "a b"]}
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(texts))
    assert unseen_texts(tmp_path / "none.yaml", "none", unseen, splits) == ["good day", "a b"]


def test_what_was_measured_reads_back(tmp_path: Path) -> None:
    found = {"mlp": measure_novelty(Told(), ["90", "80"], ["70"], threshold=0.5)}
    write_novelty(tmp_path / "sums.json", found)
    assert read_novelty(tmp_path / "sums.json") == found
