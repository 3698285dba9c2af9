"""The stages of baselines that make or weigh adapters, in one process, on a tiny model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlplora.records.scores import ItemScore, read_items, read_summary
from tasks import (
    adapter,
    compare,
    evaluate,
    evaluate_arrow,
    evaluate_base,
    evaluate_single,
    ingest,
    joint,
    lorahub,
    merge,
)
from tests.tasks.test_pipeline import params
from tests.tiny import choices, opposites, write_raw, write_tiny_folder, write_tiny_tokenizer

TASKS = ("colours", "opposites")
DATA = Path("data")
BASE, ADAPTERS, TIMING = DATA / "base", DATA / "adapters", Path("timing.json")
EXAMPLES, SCORES = DATA / "examples", DATA / "scores/iid"
TESTS = EXAMPLES / "test"
SECTIONS: dict[str, Any] = {
    "joint": {"multitask": {"rank": 4, "alpha": 8, "steps": 4}},
    "merges": {"merge_cat": {"kind": "cat", "weights": "mean"}},
    "arrow": {"arrow": {"top_k": 1, "temperature": 1.0}},
    "lorahub": {
        "lorahub": {
            "shots": 2,
            "steps": 5,
            "bound": 1.5,
            "regularisation": 0.05,
            "max_tokens": 64,
        }
    },
    "systems": {
        "uniform": {"artifact": "data/adapters", "route": "uniform"},
        "multitask": {"artifact": "data/joint/multitask", "route": "fixed"},
        "merge_cat": {"artifact": "data/merged/merge_cat", "route": "fixed"},
        "lorahub": {"artifact": "data/lorahub/lorahub", "route": "by_task"},
    },
    "composites": {},
    "unseen_tasks": {},
}
MAKE: dict[str, Callable[[Path], None]] = {
    "joint/multitask": lambda out: joint.main("multitask", BASE, EXAMPLES, out, TIMING),
    "merged/merge_cat": lambda out: merge.main("merge_cat", BASE, ADAPTERS, out, TIMING),
    "lorahub/lorahub": lambda out: lorahub.main("lorahub", BASE, ADAPTERS, EXAMPLES, out, TIMING),
    "scores/iid/arrow": lambda out: evaluate_arrow.main(
        "arrow", BASE, ADAPTERS, TESTS, out, TIMING
    ),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose scores were compared."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        values = params("0" * 64, root) | SECTIONS
        Path("params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        write_tiny_folder(BASE)
        write_tiny_tokenizer(BASE)
        write_raw(Path("suites/opposites.json"), opposites(70))
        write_raw(Path("suites/colours.json"), choices(70))
        for task in TASKS:
            raw, own, test = Path(f"suites/{task}.json"), ADAPTERS / task, TESTS / f"{task}.parquet"
            ingest.main(task, raw, BASE, EXAMPLES, Path("findings.json"), TIMING)
            adapter.main(task, BASE, EXAMPLES, own, TIMING)
            evaluate_base.main(task, BASE, test, SCORES / "base" / task, TIMING)
            evaluate_single.main(task, BASE, own, test, SCORES / "single" / task, TIMING)
        for out, make in MAKE.items():
            make(DATA / out)
        for name, system in SECTIONS["systems"].items():
            artifact = Path(system["artifact"])
            evaluate.main(name, BASE, ADAPTERS, artifact, TESTS, SCORES / name, TIMING)
        compare.main(SCORES.parent, DATA / "comparison", DATA / "comparison.json", TIMING)
    return root


def items(project: Path, system: str) -> list[ItemScore]:
    return read_items(project / SCORES / system)


def test_the_comparison_lists_all_of_them(project: Path) -> None:
    scores = json.loads((project / "data/comparison.json").read_text())["iid"]
    assert list(scores) == ["base", "single", *SECTIONS["systems"], "arrow"]
    told = {name: row["routing_accuracy"] for name, row in scores.items()}
    assert told["lorahub"] == 1.0  # it is told the task
    assert told["multitask"] is told["merge_cat"] is told["arrow"] is None


def test_cat_answers_as_all_adapters_alike(project: Path) -> None:
    for one, other in zip(items(project, "merge_cat"), items(project, "uniform"), strict=True):
        assert one.generated == other.generated
        if one.options is not None and other.options is not None:
            assert one.options.logprobs == pytest.approx(other.options.logprobs, abs=1e-4)


def test_one_adapter_answers_everything_where_the_route_is_fixed(project: Path) -> None:
    for name in ("multitask", "merge_cat"):
        routes = {item.route.mix for item in items(project, name) if item.route}
        assert routes == {((name, 1.0),)}


def test_arrow_has_no_routes_to_tell(project: Path) -> None:
    assert {item.route for item in items(project, "arrow")} == {None}
    summary = read_summary(project / SCORES / "arrow")
    assert (summary.routing_accuracy, summary.adapters_per_prompt) == (None, None)
    comparison = json.loads((project / "data/comparison/iid.json").read_text())
    assert "arrow" not in comparison["routing"]
    assert all(sample["answers"]["arrow"]["route"] is None for sample in comparison["samples"])


def test_arrow_answers_otherwise_than_the_base_model(project: Path) -> None:
    base = [item for task in TASKS for item in items(project, f"base/{task}")]
    found = items(project, "arrow")
    assert [item.id for item in found] == [item.id for item in base]
    assert any(
        one.options and other.options and one.options.logprobs != other.options.logprobs
        for one, other in zip(found, base, strict=True)
    )


def test_each_task_has_its_own_composed_adapter(project: Path) -> None:
    folder = project / "data/lorahub/lorahub"
    assert sorted(path.name for path in folder.iterdir()) == [*TASKS, "weights.json"]
    for item in items(project, "lorahub"):
        assert item.route is not None
        assert item.route.mix == ((item.task, 1.0),)


def test_overrides_of_the_joint_training_are_in_force(project: Path) -> None:
    config = json.loads((project / "data/joint/multitask/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    training = json.loads((project / "data/joint/multitask/training.json").read_text())
    assert training["num_examples"] == 4 * 8
    assert [point["step"] for point in training["curve"]["points"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("out", MAKE)
def test_a_second_run_gives_the_same_bytes(
    project: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(project)
    MAKE[out](Path("again"))
    files = [path.relative_to(DATA / out) for path in (DATA / out).rglob("*") if path.is_file()]
    assert len(files) >= 2
    for file in files:
        assert (DATA / out / file).read_bytes() == (Path("again") / file).read_bytes(), file
    shutil.rmtree("again")
