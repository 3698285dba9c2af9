"""All systems that a folder holds, served at once; what is left out is told."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dlplora.errors import ParamsError
from dlplora.serving.systems import servable_systems
from tests.project import ROOT
from tests.serving.running import running, write_version

SERVED = ["dlp_mlp", "base", "dlp_mlp_keep", "dlp_mlp_refill", "dlp_mlp_top1", "random", "uniform"]
SERVED += ["logo", "fused", "joined", "weighed_experts", "arrow"]
NO_ADAPTERS = {"base", "joined", "weighed_experts"}


@pytest.fixture
def project(data: Path, tmp_path: Path) -> Path:
    """The data of a copy of the project."""
    shutil.copytree(data.parent, tmp_path / "project")
    return tmp_path / "project/data"


def test_all_systems_answer_route_and_score_and_others_are_told_why(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dlplora"), running(data, systems="all") as server:
        assert set(server.server.api.models.current.engine.systems) == set(SERVED)
        assert server.server.api.models.current.default == SERVED[0]
        names = {row["id"] for row in server.get("/v1/models").json()["data"]}
        assert names == {*SERVED, "base", "colours", "opposites"}
        for name in SERVED:
            messages = [{"role": "user", "content": "say red"}]
            for path, body in (
                ("/v1/chat/completions", {"messages": messages, "max_tokens": 2}),
                ("/v1/route", {"texts": ["say red"]}),
                ("/v1/score", {"prompt": "say red", "options": ["red", "blue"]}),
            ):
                reply = server.post(path, body | {"model": name})
                assert reply.status_code == 200, (name, reply.text)
    told = [one.message for one in caplog.records if "is left out" in one.message]
    params = yaml.safe_load((data.parent / "params.yaml").read_text())
    assert len(told) == len(params["systems"].keys() - SERVED)
    assert "the system single is left out: it needs the task; name it: --system single:TASK" in told
    (unmade,) = [one for one in told if "system unmade" in one]
    assert "routers/unmade" in unmade
    assert "`dlplora repro` makes it" in unmade
    assert not any("\n" in one for one in told)


def test_what_a_pipeline_has_not_made_for_all_tasks_is_left_out(project: Path) -> None:
    assert servable_systems(project)[0] == "dlp_mlp"
    card = project / "routers/mlp/router.json"
    whole = card.read_text()
    for change in ({"labels": ["colours"]}, {"base_fingerprint": "another"}):
        card.write_text(json.dumps(json.loads(whole) | change))
        left = servable_systems(project)
        assert set(left) == {"base", "random", "uniform", "logo", "joined", "arrow"}
    card.write_text(whole)
    training = project / "adapters/colours/training.json"
    before = training.read_text()
    training.write_text(json.dumps(json.loads(before) | {"base_fingerprint": "another"}))
    assert set(servable_systems(project)) == NO_ADAPTERS
    training.write_text(before)
    shutil.rmtree(project / "adapters/colours")
    assert set(servable_systems(project)) == NO_ADAPTERS
    shutil.rmtree(project / "experts/all")
    shutil.rmtree(project / "joint")
    with running(project, systems="all") as server:
        assert server.server.api.models.current.default == "base"


def test_where_nothing_can_be_served_the_error_says_what_to_run(project: Path) -> None:
    shutil.rmtree(project / "base")
    with pytest.raises(ParamsError, match="no system can be served; `make repro` makes"):
        servable_systems(project)


def test_another_version_has_its_own_systems(data: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        write_version(data, tmp_path / f"v0.0.{number}", number)
    file = tmp_path / "v0.0.2/params.yaml"
    params = yaml.safe_load(file.read_text())
    params["systems"]["new"] = params["systems"].pop("uniform")
    params["default_system"] = "logo"
    file.write_text(yaml.safe_dump(params))
    current = tmp_path / "current"
    current.symlink_to("v0.0.1")
    with running(current, systems="all") as server:
        models = server.server.api.models
        first = models.current
        assert set(first.engine.systems) == set(SERVED)
        (tmp_path / "next").symlink_to("v0.0.2")
        os.replace(tmp_path / "next", current)
        deadline = time.monotonic() + 30
        while models.current is first and time.monotonic() < deadline:
            time.sleep(0.05)
        assert set(models.current.engine.systems) == {*SERVED, "new"} - {"uniform"}
        assert models.current.default == "logo"
        gone = server.post("/v1/route", {"model": "uniform", "texts": ["say red"]})
        assert (gone.status_code, gone.json()["error"]["param"]) == (404, "model")


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (["--system", "logo"], 2, "--all-systems serves all; leave out --system"),
        ([], 1, "no system can be served; `make repro` makes what they need"),
    ],
)
def test_the_command_refuses_in_one_line(
    project: Path, more: list[str], code: int, told: str
) -> None:
    shutil.rmtree(project / "base")
    words = [sys.executable, "-m", "dlplora.cli", "serve", "--no-log", "--port", "0"]
    found = subprocess.run(
        [*words, "--model", str(project), "--all-systems", *more],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == code
    assert told in found.stderr.splitlines()[-1]
    assert "Traceback" not in found.stderr
