"""The stages around CGC-LoRA's experts, one after another in one process, on a tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from dlplora.records.scores import ItemScore, read_items
from tasks import (
    adapter,
    compare,
    evaluate,
    evaluate_base,
    evaluate_gated,
    evaluate_single,
    experts,
    ingest,
    router,
    router_data,
)
from tests.tasks.test_pipeline import params
from tests.tiny import choices, opposites, write_raw, write_tiny_folder, write_tiny_tokenizer

TASKS = ("colours", "opposites")
DATA = Path("data")
BASE, TESTS, TIMING = DATA / "base", DATA / "examples/test", Path("timing.json")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose scores were compared."""
    root = tmp_path_factory.mktemp("project")
    clusters = {"one": ["opposites"], "two": ["colours"]}
    settings = {"common": 1, "specific": 1, "expert_rank": 1, "embedding": 4}
    names = list(clusters)
    cgc = {"artifact": "data/experts", "route": "own_expert", "clusters": names}
    routed = {"experts": "data/experts", "router": "data/routers/tfidf", "clusters": names}
    values = params("0" * 64, root) | {
        "experts": {
            name: {"tasks": tasks, **settings, "training": {"steps": 4, "learning_rate": 0.02}}
            for name, tasks in clusters.items()
        },
        "systems": {"cgc": cgc},
        "gated_systems": {"cgc_routed": routed},
        "composites": {},
        "unseen_tasks": {},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        write_tiny_folder(BASE)
        write_tiny_tokenizer(BASE)
        write_raw(Path("suites/opposites.json"), opposites(70))
        write_raw(Path("suites/colours.json"), choices(70))
        scores, examples = DATA / "scores/iid", DATA / "examples"
        for task in TASKS:
            raw, own = Path(f"suites/{task}.json"), DATA / "adapters" / task
            test = TESTS / f"{task}.parquet"
            ingest.main(task, raw, BASE, examples, Path("findings.json"), TIMING)
            adapter.main(task, BASE, examples, own, TIMING)
            evaluate_base.main(task, BASE, test, scores / "base" / task, TIMING)
            evaluate_single.main(task, BASE, own, test, scores / "single" / task, TIMING)
        router_data.main(examples, DATA / "router_data", TIMING)
        router.main("tfidf", DATA / "router_data", BASE, DATA / "routers/tfidf", TIMING)
        for name in clusters:
            experts.main(name, BASE, examples, DATA / "experts" / name, TIMING)
        pool = DATA / "adapters"
        evaluate.main("cgc", BASE, pool, DATA / "experts", TESTS, scores / "cgc", TIMING)
        gated(scores / "cgc_routed")
        compare.main(scores.parent, DATA / "comparison", DATA / "comparison.json", TIMING)
    return root


def gated(out: Path) -> None:
    evaluate_gated.main(
        "cgc_routed", BASE, DATA / "experts", DATA / "routers/tfidf", TESTS, out, TIMING
    )


def items(project: Path, system: str) -> list[ItemScore]:
    return read_items(project / "data/scores/iid" / system)


def test_the_comparison_lists_both_systems(project: Path) -> None:
    scores = json.loads((project / "data/comparison.json").read_text())["iid"]
    assert list(scores) == ["base", "single", "cgc", "cgc_routed"]
    assert scores["cgc"]["routing_accuracy"] == 1.0  # it is told the task
    assert scores["cgc_routed"]["routing_accuracy"] is None  # its experts are no task's own


def test_the_told_system_gives_each_item_the_folded_adapter_of_its_task(project: Path) -> None:
    for item in items(project, "cgc"):
        assert item.route.adapters == (item.task,)


def test_the_routed_system_gives_each_item_the_experts_of_one_cluster(project: Path) -> None:
    experts_of = {
        "colours": ("two.common.1", "colours.1"),
        "opposites": ("one.common.1", "opposites.1"),
    }
    routed = items(project, "cgc_routed")
    assert all(item.route.adapters in experts_of.values() for item in routed)
    right = [item.route.adapters == experts_of[item.task] for item in routed]
    assert sum(right) > 0.8 * len(right)


def test_items_that_a_cluster_of_one_task_gets_rightly_are_answered_as_by_the_told_one(
    project: Path,
) -> None:
    told = {item.id: item for item in items(project, "cgc")}
    for item in items(project, "cgc_routed"):
        if item.route.adapters[1].startswith(item.task):
            other = told[item.id]
            assert item.prediction == other.prediction
            if item.options is not None and other.options is not None:
                assert item.options.logprobs == pytest.approx(other.options.logprobs, abs=1e-4)


def test_every_cluster_leaves_experts_and_a_plain_adapter_for_each_task(project: Path) -> None:
    for name, task in (("one", "opposites"), ("two", "colours")):
        folder = project / "data/experts" / name
        assert sorted(path.name for path in folder.iterdir()) == [
            *("adapters", "experts.json", "experts.safetensors")
        ]
        assert sorted(path.name for path in (folder / "adapters" / task).iterdir()) == [
            *("adapter_config.json", "adapter_model.safetensors", "training.json")
        ]
        card = json.loads((folder / "experts.json").read_text())
        assert (card["active_rank"], card["total_rank"]) == (2, 2)


def test_a_second_training_gives_the_same_bytes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    first = DATA / "experts/one"
    experts.main("one", BASE, DATA / "examples", DATA / "again", TIMING)
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert len(files) == 5
    for file in files:
        assert (first / file).read_bytes() == (DATA / "again" / file).read_bytes()
    shutil.rmtree(DATA / "again")
