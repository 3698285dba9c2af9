"""The project's own .gitignore wins over a list of the user's."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HIDING = "data/\nraw\n*.lock\n*.dvc\n*.json\n*.yaml\nsuites/\n"
SEEN = [
    "dvc.yaml",
    "dvc.lock",
    "params.yaml",
    "data/raw/mine/mine.json.dvc",
    "data/raw/mine/.gitkeep",
    "data/imported/mine.dvc",
    "data/metrics.json",
    "suites/mine.yaml",
    "suites/toy/mine.json",
]
HIDDEN = [
    "data/base",
    "data/raw/mine/mine.json",
    "data/raw/mine/folder/more.json",
    "data/raw/mine.json",
    "data/adapters/mine",
    ".scratch/locks",
    ".venv/bin",
    "dvc_plots/index.html",
]


@pytest.mark.parametrize("hiding", ["", HIDING], ids=["no list", "a list"])
def test_results_are_ignored_and_what_git_and_dvc_keep_is_not(
    tmp_path: Path, root: Path, hiding: str
) -> None:
    (tmp_path / "hidden").write_text(hiding)
    (tmp_path / "config").write_text(f"[core]\n\texcludesFile = {tmp_path / 'hidden'}\n")
    environment = os.environ | {"GIT_CONFIG_GLOBAL": str(tmp_path / "config")}
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(root / ".gitignore", project)
    subprocess.run(["git", "init", "-q"], cwd=project, env=environment, check=True)
    told = subprocess.run(
        ["git", "check-ignore", *SEEN, *HIDDEN],
        cwd=project,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert told.stdout.splitlines() == HIDDEN
