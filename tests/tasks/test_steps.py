"""Answers of several hundred tokens with a final one behind a mark: from a file to the report."""

import json
from dataclasses import replace
from pathlib import Path

import yaml

from dlplora import warm
from dlplora.evaluation.metrics import exact_match
from dlplora.records.scores import read_items
from tests.project import params, write_project
from tests.tiny import step_problems, write_raw, write_tiny_folder

NUM_PROBLEMS = 120


def test_problems_with_long_answers_work_by_add_task_from_file_to_report(tmp_path: Path) -> None:
    sha256 = write_tiny_folder(tmp_path / "tiny_base", positions=2048)
    write_raw(tmp_path / "problems.json", step_problems(NUM_PROBLEMS))
    values = params(sha256, tmp_path / "tiny_base") | {"composites": {}, "unseen_tasks": {}}
    for section in ("tasks", "adapters"):
        del values[section]["colours"]
    for section, names in {"routers": ["encoder"], "systems": ["uniform", "logo_norm"]}.items():
        for name in names:
            del values[section][name]
    values["adapter"]["max_tokens"] = 1024
    root = tmp_path / "project"
    made = write_project(root, values)
    with warm.server_for(root) as told:
        checkout = replace(made, told=told)
        checkout.repro("base_model")
        checkout.cli("add-task", "marbles", str(tmp_path / "problems.json"))
        task = yaml.safe_load((root / "params.yaml").read_text())["tasks"]["marbles"]
        assert (task["primary"], task["answer_after"]) == ("exact_match", "####")
        assert task["max_new_tokens"] > 250
        checkout.repro()
    findings = json.loads((root / "data/findings/marbles.json").read_text())
    assert (findings["distinct"], findings["skipped"]) == (NUM_PROBLEMS, 0)
    training = json.loads((root / "data/adapters/marbles/training.json").read_text())
    assert 200 < training["longest_answer_tokens"] < 400
    items = read_items(root / "data/scores/iid/dlp_mlp")
    assert {item.task for item in items} == {"opposites", "marbles"}
    for item in items:
        assert item.score == exact_match(item.generated, item.references, item.answer_after)
        assert item.answer_after == ("####" if item.task == "marbles" else None)
    assert "marbles" in (root / "data/report/report.md").read_text()
