"""dvc.yaml must name every file and parameter that a stage's result depends on."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlplora.fingerprints import PACKAGES
from dlplora.params import Params, load_params

ROOT = Path(__file__).parent.parent
STAGES: dict[str, dict[str, Any]] = {
    name: stage.get("do", stage) | {"foreach": stage.get("foreach")}
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()
}
TRAINING = [
    "adapter",
    "experts",
    "router_data",
    "router",
    "retriever_data",
    "tuned_embedder",
    "index",
    "embedding_router",
]


def outputs(stage: dict[str, Any]) -> list[str]:
    listed = [*stage.get("outs", []), *stage.get("metrics", [])]
    return [out if isinstance(out, str) else next(iter(out)) for out in listed]


def tracked(name: str) -> set[str]:
    """Return the sections of params that a stage tracks values of."""
    return {param.split(".")[0] for param in STAGES[name].get("params", [])}


@pytest.mark.parametrize("name", sorted(STAGES.keys() - {"code"}))
def test_a_stage_depends_on_the_fingerprints_of_its_own_code(name: str) -> None:
    code = [dep for dep in STAGES[name]["deps"] if not dep.startswith(("data/", "${"))]
    assert code == []
    listed = [dep for dep in STAGES[name]["deps"] if dep.startswith("data/code")]
    assert listed == [f"data/code/{name}.json"]


def test_the_fingerprints_depend_on_all_code() -> None:
    assert STAGES["code"]["deps"] == list(PACKAGES)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_the_file_of_its_name_on_known_params(name: str) -> None:
    assert STAGES[name]["cmd"].startswith(f"python -m tasks.{name} ")
    assert tracked(name) <= set(Params.model_fields)


@pytest.mark.parametrize("name", STAGES)
def test_every_section_that_a_stage_reads_is_tracked(name: str) -> None:
    tree = ast.parse((ROOT / "tasks" / f"{name}.py").read_text())
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id == "params")
            or (isinstance(node.value, ast.Call) and "load_params" in ast.dump(node.value.func))
        )
    }
    sections = {"adapter", "adapters"} if "adapter_of" in read else set()
    sections |= {"adapter", "experts"} if "expert_training_of" in read else set()
    sections |= read & set(Params.model_fields)
    assert sections <= tracked(name)


@pytest.mark.parametrize("name", STAGES)
def test_a_path_out_of_params_stands_in_quotes_in_a_command(name: str) -> None:
    names = {"${key}", "${item.embedder}", "${item.system}"}  # identifiers
    unquoted = re.sub(r'"[^"]*"', "", STAGES[name]["cmd"])
    assert set(re.findall(r"\$\{.*?\}", unquoted)) <= names


def test_each_stage_has_one_file_and_each_file_its_stage() -> None:
    files = {path.stem for path in (ROOT / "tasks").glob("*.py")} - {"__init__"}
    assert files == set(STAGES)


@pytest.mark.parametrize("name", TRAINING)
def test_what_trains_depends_on_no_test_file(name: str) -> None:
    assert not [dep for dep in STAGES[name]["deps"] if dep.startswith("data/examples/test")]
    assert "data/examples" not in STAGES[name]["deps"]


def test_only_timings_and_the_report_may_differ_between_identical_runs() -> None:
    for name, stage in STAGES.items():
        timed = [out for out in outputs(stage) if out.startswith("data/timings")]
        assert len(timed) == (name not in ("code", "report")), name  # a comment draws no report


def test_stages_that_read_a_folder_track_the_dict_that_they_iterate_over() -> None:
    params = load_params(ROOT / "params.yaml")
    folders = {"data/adapters", "data/examples/train", "data/examples/test", "data/findings"}
    for name, stage in STAGES.items():
        if folders & set(stage["deps"]):
            assert {"tasks", "experts"} & tracked(name), name  # a cluster lists its tasks
    assert set(params.adapters) | set(params.imported_adapters) == set(params.tasks)
