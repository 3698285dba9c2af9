"""Fingerprints of code: which modules count for a stage, and which edits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dlplora.errors import DlpLoraError
from dlplora.fingerprints import fingerprint, fingerprints

LOADED = """
import json, sys
import tasks.{stage}
print(json.dumps([name for name in sys.modules if name.startswith(("dlplora.", "tasks."))]))
"""
UNTRACKED = ("dlplora.errors", "dlplora.params", "dlplora.scratch", "dlplora.stage", "dlplora.edge")
SOURCE = """
def twice(x: int) -> int:
    \"\"\"Return it twice.\"\"\"
    return 2 * x
"""


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, dict[str, str]]:
    return fingerprints(request.config.rootpath)


@pytest.mark.parametrize("stage", ["adapter", "compare", "evaluate", "ingest", "report", "router"])
def test_whatever_a_stage_loads_is_listed(
    found: dict[str, dict[str, str]], root: Path, stage: str
) -> None:
    words = [sys.executable, "-c", LOADED.format(stage=stage)]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    files = {Path(*module.split(".")).with_suffix(".py") for module in json.loads(done.stdout)}
    loaded = {file.as_posix() for file in files if (root / file).is_file()}
    untracked = tuple(module.replace(".", "/") for module in UNTRACKED)
    assert {file for file in loaded if not file.startswith(untracked)} <= found[stage].keys()
    assert not [file for file in found[stage] if file.startswith(untracked)]


def test_each_stage_has_its_own_file_and_the_report_its_templates(
    found: dict[str, dict[str, str]],
) -> None:
    assert all(f"tasks/{stage}.py" in files for stage, files in found.items())
    assert "dlplora/report/page.html.jinja" in found["report"]
    assert "dlplora/training/adapter.py" in found["adapter"]
    assert "dlplora/training/router.py" not in found["adapter"]


@pytest.mark.parametrize(
    ("edited", "counts"),
    [
        (SOURCE + "# a comment", False),
        (SOURCE.replace("Return it twice.", "Double it."), False),
        (SOURCE.replace("2 * x", "(2\n            * x)"), False),
        (SOURCE.replace("2 * x", "3 * x"), True),
        (SOURCE.replace("x: int", "x: float"), True),
        (SOURCE + "thrice = 3", True),
    ],
)
def test_only_what_code_does_counts(tmp_path: Path, edited: str, counts: bool) -> None:
    file = tmp_path / "code.py"
    file.write_text(SOURCE)
    before = fingerprint(file)
    file.write_text(edited)
    assert (fingerprint(file) != before) == counts


def test_every_byte_of_a_template_counts(tmp_path: Path) -> None:
    file = tmp_path / "page.jinja"
    file.write_text("a {# b #}")
    before = fingerprint(file)
    file.write_text("a {# c #}")
    assert fingerprint(file) != before


def test_what_is_no_python_is_named(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("def twice(:")
    with pytest.raises(DlpLoraError, match=r"code\.py: not Python: .*line 1"):
        fingerprint(file)
