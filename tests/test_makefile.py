"""The Makefile in folders of any name, with an environment here or elsewhere."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PYTHON = '#!/bin/sh\necho "$0: $*"; command -v python; echo "safe: $PYTHONSAFEPATH"\n'


def _without_make() -> dict[str, str]:
    """Return the environment without what a make around these tests tells a make within."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "MFL", "VENV"))
    }


@pytest.mark.parametrize("folder", ["plain", "my project (1)", "o'er & über #2"])
@pytest.mark.parametrize("place", ["", "an env", "/an env [2]/v"])
def test_every_folder_may_hold_the_project_and_its_environment(
    tmp_path: Path, root: Path, folder: str, place: str
) -> None:
    project = tmp_path / folder
    project.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, project / name)
    venv = f"{tmp_path}{place}" if place.startswith("/") else place or ".venv"
    binaries = project / venv / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(PYTHON)
    (binaries / "python").chmod(0o755)
    (project / venv / "installed").touch()
    done = subprocess.run(
        ["make", "repro", *([f"VENV={venv}"] if place else [])],
        cwd=project,
        env={**_without_make(), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [f"{venv}/bin/python: -m dlplora.cli repro", f"{binaries}/python", "safe: "]
    assert done.stdout.splitlines() == told
