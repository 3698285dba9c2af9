"""A router's mix of experts against the formula of arXiv 2402.01684 written out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.lora.attach import attached
from dlplora.lora.cluster import Cluster
from dlplora.records.routes import Route
from dlplora.routing.base import Probabilities
from dlplora.routing.gated import GatedRouter, expert_route
from tests.device import on_device
from tests.tiny import tiny_model

IDS = on_device([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
PATHS = {
    f"model.layers.{n}.self_attn.{name}": out
    for n in (0, 1)
    for name, out in (("q_proj", 16), ("v_proj", 8))
}
SCALING = 1.75


def expert(name: str) -> LoraAdapter:
    """Make an expert of rank 2 with random matrices."""
    pairs = {
        path: LoraPair(0.3 * torch.randn(2, 16), 0.3 * torch.randn(out, 2), SCALING)
        for path, out in PATHS.items()
    }
    return LoraAdapter(name, pairs)


def cluster(name: str, tasks: Sequence[str], *, seed: int = 0) -> Cluster:
    """Make a cluster with two common experts and three for each task, and a random gate."""
    torch.manual_seed(seed)
    return Cluster(
        name=name,
        base_fingerprint="f" * 64,
        common=tuple(expert(f"{name}.common.{number}") for number in (1, 2)),
        specific={
            task: tuple(expert(f"{task}.{number}") for number in (1, 2, 3)) for task in tasks
        },
        embeddings_TD=torch.randn(len(tasks), 6),
        weight_ED=torch.randn(5, 6),
    )


@dataclass(frozen=True)
class Told:
    """A classifier that gives each text the probabilities that it is told."""

    labels: tuple[str, ...]
    rows: Sequence[Sequence[float]]

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        return np.array(self.rows[: len(texts)])


class Formula(nn.Module):
    """The mix of the experts of one text, written out for one layer."""

    def __init__(self, base: nn.Module, path: str, found: Cluster, p: Sequence[float]) -> None:
        super().__init__()
        self.base, self.path, self.found, self.p = base, path, found, p

    def forward(self, x: Tensor) -> Tensor:
        found = self.found
        mixed = sum(p * e for p, e in zip(self.p, found.embeddings_TD, strict=True))
        g = torch.softmax(found.weight_ED @ mixed, 0)

        def added(one: LoraAdapter) -> Tensor:
            pair = one.pairs[self.path]
            return x @ pair.down_RI.T @ pair.up_OR.T

        delta = sum(g[i] * added(one) for i, one in enumerate(found.common))
        for p, own in zip(self.p, found.specific.values(), strict=True):
            delta = delta + p * sum(g[2 + j] * added(one) for j, one in enumerate(own))
        y: Tensor = self.base(x) + SCALING * delta
        return y


def by_formula(found: Cluster, p: Sequence[float], ids: Tensor) -> Tensor:
    model = tiny_model()
    for path in PATHS:
        parent, _, name = path.rpartition(".")
        layer = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, Formula(layer, path, found, p))
    logits: Tensor = model(ids).logits
    return logits


def fused(adapters: Sequence[LoraAdapter], routes: Sequence[Route], ids: Tensor) -> Tensor:
    model = tiny_model()
    with attached(model, adapters) as pool, pool.mixing(pool.mix(routes)):
        logits: Tensor = model(ids).logits
    return logits


P = [[0.7, 0.1, 0.2], [0.05, 0.05, 0.9], [0.4, 0.35, 0.25]]


def test_the_fused_engine_gives_what_the_formula_gives() -> None:
    found = cluster("all", ["a", "b", "c"])
    router = GatedRouter(Told(("a", "b", "c"), P), [found])
    routes = router.route(["", "", ""])
    assert all(len(route.adapters) == 2 + 3 * 3 for route in routes)
    assert all(sum(route.weights) == pytest.approx(1) for route in routes)
    together = fused(found.experts, routes, IDS)
    for number, p in enumerate(P):
        expected = by_formula(found, p, IDS[[number]])
        torch.testing.assert_close(together[[number]], expected, atol=1e-5, rtol=1e-5)


def test_one_sure_task_is_that_tasks_folded_adapter() -> None:
    found = cluster("all", ["a", "b", "c"])
    for number, task in enumerate(found.tasks):
        route = expert_route(found, np.eye(3)[number])
        assert set(route.adapters) == {
            *("all.common.1", "all.common.2"),
            *(f"{task}.{place}" for place in (1, 2, 3)),
        }
        told = fused([found.folded(task)], [Route((task,), (1.0,))] * 3, IDS)
        routed = fused(found.experts, [route] * 3, IDS)
        torch.testing.assert_close(routed, told, atol=1e-5, rtol=1e-5)


def test_labels_in_another_order_than_the_tasks_route_alike() -> None:
    found = cluster("all", ["a", "b", "c"])
    (one,) = GatedRouter(Told(("a", "b", "c"), P[:1]), [found]).route([""])
    (other,) = GatedRouter(Told(("c", "a", "b"), [[0.2, 0.7, 0.1]]), [found]).route([""])
    assert dict(one.mix) == pytest.approx(dict(other.mix))


def test_of_several_clusters_the_likeliest_answers_by_its_own_probabilities() -> None:
    first, second = cluster("first", ["a", "b"]), cluster("second", ["c", "d"], seed=1)
    told = Told(("a", "b", "c", "d"), [[0.4, 0.0, 0.3, 0.3], [0.3, 0.3, 0.4, 0.0]])
    routes = GatedRouter(told, [first, second]).route(["", ""])
    assert routes == [
        expert_route(second, np.array([0.5, 0.5])),
        expert_route(first, np.array([0.5, 0.5])),
    ]


def test_no_route_claims_to_be_a_tasks_own_adapter() -> None:
    found = cluster("all", ["a", "b", "c"])
    for route in GatedRouter(Told(("a", "b", "c"), P), [found]).route(["", "", ""]):
        assert route.confidence is None
        assert route.first not in found.tasks
