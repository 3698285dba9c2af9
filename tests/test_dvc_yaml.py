"""dvc.yaml must name every file and parameter that a stage's result depends on."""

import ast
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from dlplora.fingerprints import PACKAGES
from dlplora.params.load import load_params
from dlplora.params.project import Params, Served
from dlplora.records.comparison import Comparison, write_comparisons
from dlplora.report.stages import STAGE_SECTIONS
from dlplora.words import NUM_QUESTIONS, Setting

ROOT = Path(__file__).parent.parent
STAGES: dict[str, dict[str, Any]] = {
    name: stage.get("do", stage) | {"foreach": stage.get("foreach")}
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()
}
EMPTY = Comparison("iid", "single", "base", {}, (), {}, {}, {}, {}, {}, ())
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


def entries(stage: dict[str, Any]) -> list[str | dict[str, Any]]:
    return [*stage.get("outs", []), *stage.get("metrics", [])]


def outputs(stage: dict[str, Any]) -> list[str]:
    return [out if isinstance(out, str) else next(iter(out)) for out in entries(stage)]


def test_git_keeps_what_dvc_does_not_cache() -> None:
    listed = [out for stage in STAGES.values() for out in entries(stage) if isinstance(out, dict)]
    uncached = {path for out in listed for path, how in out.items() if not how["cache"]}
    seen = {line[2:] for line in (ROOT / ".gitignore").read_text().split() if line[:7] == "!/data/"}
    registered = {"data/model.json"}  # by a retrain, with each version
    assert uncached | registered == {path for path in seen if path.endswith(".json")}


DERIVED = {  # the sections that functions of these modules read
    "adapter_of": {"adapter", "adapters"},
    "joint_of": {"adapter", "joint"},
    "expert_training_of": {"adapter", "experts"},
    "router_names": {"routers", "embedding_routers"},
    "timed_stages": {section for section in STAGE_SECTIONS.values() if section},
    "is_in_model": {"systems"},
    "served_of": set(Served.model_fields),
    "embedder_names": {"embedders", "tuned_embedders"},
}


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
    assert STAGES["code"]["deps"] == [*PACKAGES, "constraints.txt"]


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
    called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    derived = {section for function in called for section in DERIVED.get(function, ())}
    sections = derived | read & set(Params.model_fields)
    assert sections - {"answers"} <= tracked(name)  # what is kept of answers changes no result


@pytest.mark.parametrize("name", STAGES)
def test_only_what_trains_by_kernels_depends_on_them(name: str) -> None:
    source = (ROOT / "tasks" / f"{name}.py").read_text()
    listed = {one for one in STAGES[name].get("params", []) if one.split(".")[0] == "runtime"}
    if "params.runtime.kernels" in source or "params.runtime.model_dump" in source:
        assert listed == {"runtime"}
    elif "set_up(" in source or "served_of(" in source:
        assert listed == {"runtime.dtype", "runtime.threads"}
    else:
        assert not listed
    whole = '"runtime": params.runtime,' in source  # the key of a checkpoint
    assert not whole or listed == {"runtime"}


def test_the_report_shows_the_timings_that_stages_write() -> None:
    written = {
        name: (stage["foreach"] or "").removeprefix("${").removesuffix("}") or None
        for name, stage in STAGES.items()
        if any(out.startswith("data/timings") for out in outputs(stage))
    }
    assert written == STAGE_SECTIONS


def test_all_that_is_derived_from_params_has_its_sections_here() -> None:
    files = ("params/overrides.py", "params/names.py", "report/stages.py")
    trees = [ast.parse((ROOT / "dlplora" / file).read_text()) for file in files]
    functions = {
        node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)
    }
    assert {name for name in functions if not name.startswith("_")} == DERIVED.keys()


@pytest.mark.parametrize("name", STAGES)
def test_a_path_out_of_params_stands_in_quotes_in_a_command(name: str) -> None:
    names = {"${key}", "${item.embedder}"}  # identifiers
    unquoted = re.sub(r'"[^"]*"', "", STAGES[name]["cmd"])
    assert set(re.findall(r"\$\{.*?\}", unquoted)) <= names


def test_each_stage_has_one_file_and_each_file_its_stage() -> None:
    files = {path.stem for path in (ROOT / "tasks").glob("*.py")} - {"__init__"}
    assert files == set(STAGES)


@pytest.mark.parametrize("name", TRAINING)
def test_what_trains_depends_on_no_test_file(name: str) -> None:
    assert not [dep for dep in STAGES[name]["deps"] if dep.startswith("data/examples/test")]
    assert "data/examples" not in STAGES[name]["deps"]


def test_ingest_reads_the_file_of_a_task_and_those_in_its_own_folder() -> None:
    stage = STAGES["ingest"]
    assert {"${item.raw}", "data/raw/${key}"} <= set(stage["deps"])
    assert stage["cmd"].startswith('python -m tasks.ingest ${key} "${item.raw}" data/raw/${key} ')


def test_a_system_has_a_folder_of_scores_for_each_setting() -> None:
    scores = [out for out in outputs(STAGES["evaluate"]) if out.startswith("data/scores/")]
    assert scores == [f"data/scores/{setting}/${{key}}" for setting in get_args(Setting)]
    assert list(NUM_QUESTIONS) == list(get_args(Setting))


def test_metrics_and_plots_are_of_files_that_a_stage_writes(tmp_path: Path) -> None:
    write_comparisons(tmp_path, [EMPTY], {}, {})
    columns = {
        f"data/comparison/{file.relative_to(tmp_path)}": file.read_text().strip().split(",")
        for file in tmp_path.rglob("*.csv")
    }
    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]
    drawn = [axes[axis] for plot in plots for axes in plot.values() for axis in ("x", "y")]
    for axis in drawn:
        for file, names in axis.items():
            assert ({names} if isinstance(names, str) else {*names}) <= {*columns[file]}
    assert {file for axis in drawn for file in axis} == set(columns)
    assert [name for name, stage in STAGES.items() if stage.get("metrics")] == ["compare"]


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
