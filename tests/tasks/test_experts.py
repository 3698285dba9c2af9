"""CGC-LoRA's experts, as systems of a finished project."""

import json
from pathlib import Path

import pytest

from dlplora.records.scores import ItemScore, read_items
from tests.project import CLUSTERS, Checkout


def items(methods: Path, system: str) -> list[ItemScore]:
    return read_items(methods / "data/scores/iid" / system)


def test_the_comparison_lists_both_systems(methods: Path) -> None:
    scores = Checkout(methods).scores()
    assert scores["cgc"]["routing_accuracy"] == 1.0  # an oracle
    assert scores["cgc_routed"]["routing_accuracy"] is None  # its experts are no task's own


def test_the_told_system_gives_each_item_the_folded_adapter_of_its_task(methods: Path) -> None:
    for item in items(methods, "cgc"):
        assert item.route.adapters == (item.task,)


def test_the_routed_system_gives_each_item_the_experts_of_one_cluster(methods: Path) -> None:
    experts_of = {
        "colours": ("two.common.1", "colours.1"),
        "opposites": ("one.common.1", "opposites.1"),
    }
    routed = items(methods, "cgc_routed")
    assert all(item.route.adapters in experts_of.values() for item in routed)
    right = [item.route.adapters == experts_of[item.task] for item in routed]
    assert sum(right) > 0.8 * len(right)


def test_items_that_a_cluster_of_one_task_gets_rightly_are_answered_as_by_the_told_one(
    methods: Path,
) -> None:
    told = {item.id: item for item in items(methods, "cgc")}
    for item in items(methods, "cgc_routed"):
        if item.route.adapters[1].startswith(item.task):
            other = told[item.id]
            assert item.prediction == other.prediction
            if item.options is not None and other.options is not None:
                assert item.options.logprobs == pytest.approx(other.options.logprobs, abs=1e-4)


def test_every_cluster_leaves_experts_and_a_plain_adapter_for_each_task(methods: Path) -> None:
    for name, (task,) in CLUSTERS.items():
        folder = methods / "data/experts" / name
        assert sorted(path.name for path in folder.iterdir()) == [
            *("adapters", "experts.json", "experts.safetensors")
        ]
        assert sorted(path.name for path in (folder / "adapters" / task).iterdir()) == [
            *("adapter_config.json", "adapter_model.safetensors", "training.json")
        ]
        card = json.loads((folder / "experts.json").read_text())
        assert (card["active_rank"], card["total_rank"]) == (2, 2)
