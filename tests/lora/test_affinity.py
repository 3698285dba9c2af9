"""Affinity of tasks: cosines of whole updates, whatever the ranks, and clusters by hand."""

import numpy as np
import pytest
import torch

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import ParamsError
from dlplora.lora.affinity import affinities, find_clusters


def adapter(
    name: str, *, seed: int, rank: int = 3, paths: tuple[str, ...] = ("q", "v")
) -> LoraAdapter:
    torch.manual_seed(seed)
    pairs = {
        path: LoraPair(torch.randn(rank, 6), torch.randn(5, rank), 0.5 + seed) for path in paths
    }
    return LoraAdapter(name, pairs)


def whole(one: LoraAdapter, paths: tuple[str, ...] = ("q", "v")) -> torch.Tensor:
    """Lay out the whole update of an adapter as one vector."""
    nothing = LoraPair(torch.zeros(1, 6), torch.zeros(5, 1), 1.0)
    pairs = [one.pairs.get(path, nothing) for path in paths]
    return torch.cat([(pair.scaling * pair.up_OR @ pair.down_RI).flatten() for pair in pairs])


def test_affinity_is_the_cosine_of_the_updates_of_all_weights() -> None:
    pool = [
        adapter("a", seed=0),
        adapter("b", seed=1, rank=2),
        adapter("c", seed=2, paths=("v",)),
    ]
    found = affinities(pool)
    for i, one in enumerate(pool):
        for j, other in enumerate(pool):
            expected = torch.cosine_similarity(whole(one), whole(other), dim=0).item()
            assert found[i, j] == pytest.approx(expected, abs=1e-6)


def test_scale_does_not_matter_and_an_adapter_that_adds_nothing_is_like_no_other() -> None:
    one = adapter("a", seed=0)
    double = LoraAdapter(
        "b", {path: LoraPair(p.down_RI, 2 * p.up_OR, p.scaling) for path, p in one.pairs.items()}
    )
    empty = LoraAdapter(
        "c", {path: LoraPair(p.down_RI, 0 * p.up_OR, p.scaling) for path, p in one.pairs.items()}
    )
    np.testing.assert_allclose(
        affinities([one, double, empty]), [[1, 1, 0], [1, 1, 0], [0, 0, 0]], atol=1e-12
    )


ALIKE = np.array(
    [
        [1.0, 0.1, 0.8, 0.0],
        [0.1, 1.0, 0.2, 0.7],
        [0.8, 0.2, 1.0, 0.1],
        [0.0, 0.7, 0.1, 1.0],
    ]
)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [["p", "q", "r", "s"]]),
        (2, [["p", "r"], ["q", "s"]]),
        (3, [["p", "r"], ["q"], ["s"]]),
        (4, [["p"], ["q"], ["r"], ["s"]]),
    ],
)
def test_the_most_alike_join_first(count: int, expected: list[list[str]]) -> None:
    assert find_clusters(["p", "q", "r", "s"], ALIKE, count=count) == expected


def test_the_order_of_the_tasks_does_not_matter() -> None:
    order = [2, 0, 3, 1]
    names = [["p", "q", "r", "s"][place] for place in order]
    assert find_clusters(names, ALIKE[np.ix_(order, order)], count=2) == [["p", "r"], ["q", "s"]]


@pytest.mark.parametrize("count", [0, 5])
def test_more_clusters_than_tasks_or_none_are_refused(count: int) -> None:
    with pytest.raises(ParamsError, match=f"{count} clusters of 4 tasks; expected 1 to 4"):
        find_clusters(["p", "q", "r", "s"], ALIKE, count=count)
