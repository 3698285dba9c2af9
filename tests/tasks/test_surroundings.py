"""Real `dlplora repro` of one stage where names, folders and environment are unusual ones."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from dlplora.params.load import load_params
from tests.project import ROOT, params, write_project
from tests.tiny import opposites, write_raw, write_tiny_folder

RAW = "suites/my d'ata (1) & more/é.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose folder, task and file have names that a shell or YAML could mistake."""
    root = tmp_path_factory.mktemp("surroundings") / "my project (1)"
    values = params(write_tiny_folder(root.parent / "base"), root.parent / "base")
    values["tasks"] = {"no": values["tasks"]["opposites"] | {"raw": RAW}}
    values["adapters"] = {"no": {}}
    project = write_project(root, values)
    write_raw(root / RAW, opposites(70))
    (root / "params.yaml").write_text(yaml.safe_dump(values).replace("'no':", "no:"))
    project.repro("base_model")
    return root


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / made.name)


def repro(
    project: Path, surroundings: Mapping[str, str], *words: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dlplora.cli", "repro", *words]
    return subprocess.run(
        command,
        cwd=project,
        env=os.environ | surroundings,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.parametrize(
    "surroundings",
    [
        {},
        {"FORCE_COLOR": "1", "PY_COLORS": "1", "CLICOLOR_FORCE": "1", "TTY_COMPATIBLE": "1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
        {"GIT_DIR": "/nosuch/.git", "GIT_INDEX_FILE": "/nosuch/index", "GIT_WORK_TREE": "/nosuch"},
    ],
    ids=["plain", "colours", "ASCII", "a hook of git"],
)
def test_a_stage_runs_and_writes_plain_lines(project: Path, surroundings: dict[str, str]) -> None:
    assert list(load_params(project / "params.yaml").tasks) == ["no"]
    done = repro(project, surroundings, "--force", "ingest@no")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Running stage 'ingest@no':" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert (project / "data/examples/train/no.parquet").is_file()
    assert json.loads((project / "data/findings/no.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("content", ["", '{"write": {"/a/b'])
def test_what_a_crash_has_cut_off_is_cleared(project: Path, content: str) -> None:
    for name in ("rwlock", "lock"):
        (project / ".dvc/tmp").mkdir(exist_ok=True)
        (project / ".dvc/tmp" / name).write_text(content)
    done = repro(project, {}, "ingest@no")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stage_does_not_run_another_checkouts_code(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["tasks.ingest", "no", RAW, str(out), str(out / "findings"), str(out / "timing")]
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=project,
        env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {ROOT}/dlplora: this code would run in {project}")
    assert not out.exists()


def test_without_a_git_repository_one_line_says_what_to_do(project: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(project, alone, ignore=shutil.ignore_patterns(".git", ".scratch"))
    done = repro(alone, {}, "ingest@no")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "run `git init`, or do without: `dvc config --local core.no_scm true`" in done.stderr
    (alone / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    assert repro(alone, {}, "ingest@no").returncode == 0
