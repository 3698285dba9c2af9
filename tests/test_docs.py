"""Every example of the docs runs: Python blocks one after another, and each shell command."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from dlplora import cli
from tests.lifecycle.serving import write_serving_project

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/engine.md").read_text()
COMMANDS = re.findall(r"^\$ dlplora (.+)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_serving_project(folder)
    return folder


def test_the_python_examples_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) > 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/engine.md", "exec"), names)
    assert "('opposites', 'colours')" in capsys.readouterr().out
    assert len((folder / "decisions.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_the_shell_examples_run(
    folder: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["dlplora", *shlex.split(command)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out.strip()
