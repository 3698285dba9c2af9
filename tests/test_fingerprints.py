"""Fingerprints of code: which modules count for a stage, and which edits."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dlplora.errors import DlpLoraError
from dlplora.fingerprints import StageCode, fingerprint, stage_codes

LOADED = """
import json, sys
import tasks.{stage}
print(json.dumps([name for name in sys.modules if name.startswith(("dlplora.", "tasks."))]))
"""
UNTRACKED = (
    *("dlplora.errors", "dlplora.params", "dlplora.scratch", "dlplora.stage", "dlplora.edge"),
    *("dlplora.libraries", "dlplora.fingerprints"),
)
LOGIC = {"dlplora/params/overrides.py", "dlplora/params/names.py"}
SOURCE = """
def twice(x: int) -> int:
    \"\"\"Return it twice.\"\"\"
    return 2 * x
"""


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> dict[str, StageCode]:
    return stage_codes(request.config.rootpath)


@pytest.mark.parametrize("stage", ["adapter", "compare", "evaluate", "ingest", "report", "router"])
def test_whatever_a_stage_loads_is_listed(
    found: dict[str, StageCode], root: Path, stage: str
) -> None:
    words = [sys.executable, "-c", LOADED.format(stage=stage)]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    files = {Path(*module.split(".")).with_suffix(".py") for module in json.loads(done.stdout)}
    loaded = {file.as_posix() for file in files if (root / file).is_file()}
    untracked = tuple(module.replace(".", "/") for module in UNTRACKED)
    files = found[stage].files
    assert {file for file in loaded if not file.startswith(untracked)} <= files.keys()
    assert not [f for f in files if f.startswith(untracked) and f not in LOGIC]


def test_each_stage_has_its_own_file_and_the_report_its_templates(
    found: dict[str, StageCode],
) -> None:
    assert all(f"tasks/{stage}.py" in code.files for stage, code in found.items())
    assert "dlplora/report/page.html.jinja" in found["report"].files
    assert "dlplora/training/adapter.py" in found["adapter"].files
    assert "dlplora/training/router.py" not in found["adapter"].files


def test_the_logic_that_merges_params_counts_where_it_is_used_and_no_other_params(
    found: dict[str, StageCode],
) -> None:
    overrides = {
        stage for stage, code in found.items() if "dlplora/params/overrides.py" in code.files
    }
    assert overrides == {"adapter", "experts", "joint", "model"}
    names = {stage for stage, code in found.items() if "dlplora/params/names.py" in code.files}
    assert names == {"index", "novelty", "report"}


def test_libraries_are_those_that_a_stage_computes_with_at_their_pinned_versions(
    found: dict[str, StageCode], root: Path
) -> None:
    pins = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().lower().splitlines()
    )
    for code in found.values():
        for name, version in code.libraries.items():
            assert version in (pins.get(name), pins.get(name.replace("-", "_")))
    assert {"torch", "transformers", "tokenizers", "peft"} <= found["adapter"].libraries.keys()
    assert "scipy" in found["router"].libraries  # of scikit-learn
    assert "torch" not in found["ingest"].libraries
    everywhere = {name for code in found.values() for name in code.libraries}
    assert everywhere.isdisjoint({"dvc", "grimp", "prefect", "psutil", "rich", "typer"})


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


def test_what_differs_between_versions_of_python_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12 gives functions and classes `type_params`, and ends some f-strings emptily."""
    file = tmp_path / "code.py"
    file.write_text(SOURCE + 'class A:\n    x = None\n    y = f"{1!r:>{2}} a" "b"\n')
    before = fingerprint(file)
    parse = ast.parse

    def other(*words: Any) -> ast.Module:
        tree = parse(*words)
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                node.values.append(ast.Constant(""))
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                node._fields = (*node._fields, "type_params")  # type: ignore[misc]
                node.type_params = []  # type: ignore[attr-defined]
        return tree

    monkeypatch.setattr(ast, "parse", other)
    assert fingerprint(file) == before


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
