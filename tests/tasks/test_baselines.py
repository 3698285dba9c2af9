"""Baselines that make or weigh adapters, as systems of a finished project."""

import json
from pathlib import Path

import pytest

from dlplora.records.routes import PER_TOKEN
from dlplora.records.scores import ItemScore, read_items, read_summary
from tests.project import Checkout

TASKS = ("colours", "opposites")


def items(methods: Path, system: str) -> list[ItemScore]:
    return read_items(methods / "data/scores/iid" / system)


def test_the_comparison_lists_all_of_them(methods: Path) -> None:
    scores = Checkout(methods).scores()
    told = {name: row["routing_accuracy"] for name, row in scores.items()}
    assert told["lorahub"] == 1.0  # an oracle
    assert told["multitask"] is told["merge_cat"] is told["arrow"] is None


def test_cat_answers_as_all_adapters_alike(methods: Path) -> None:
    for one, other in zip(items(methods, "merge_cat"), items(methods, "uniform"), strict=True):
        assert one.generated == other.generated
        if one.options is not None and other.options is not None:
            assert one.options.logprobs == pytest.approx(other.options.logprobs, abs=1e-4)


def test_one_adapter_answers_everything_where_the_route_is_fixed(methods: Path) -> None:
    for name in ("multitask", "merge_cat"):
        routes = {item.route.mix for item in items(methods, name)}
        assert routes == {((name, 1.0),)}


def test_arrow_has_no_routes_to_tell(methods: Path) -> None:
    assert {item.route for item in items(methods, "arrow")} == {PER_TOKEN}
    summary = read_summary(methods / "data/scores/iid" / "arrow")
    assert (summary.routing_accuracy, summary.adapters_per_prompt) == (None, None)
    comparison = json.loads((methods / "data/comparison/iid.json").read_text())
    assert "arrow" not in comparison["routing"]
    assert all(sample["answers"]["arrow"]["route"] is None for sample in comparison["samples"])


def test_arrow_answers_otherwise_than_the_base_model(methods: Path) -> None:
    base, found = items(methods, "base"), items(methods, "arrow")
    assert [item.id for item in found] == [item.id for item in base]
    assert any(
        one.options and other.options and one.options.logprobs != other.options.logprobs
        for one, other in zip(found, base, strict=True)
    )


def test_each_task_has_its_own_composed_adapter(methods: Path) -> None:
    folder = methods / "data/lorahub/lorahub"
    assert sorted(path.name for path in folder.iterdir()) == [*TASKS, "weights.json"]
    for item in items(methods, "lorahub"):
        assert item.route.mix == ((item.task, 1.0),)


def test_overrides_of_the_joint_training_are_in_force(methods: Path) -> None:
    config = json.loads((methods / "data/joint/multitask/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    training = json.loads((methods / "data/joint/multitask/training.json").read_text())
    assert training["num_examples"] == 4 * 8
    assert [point["step"] for point in training["curve"]["points"]] == [0, 1, 2, 3, 4]
