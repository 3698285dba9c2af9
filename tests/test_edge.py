"""What surrounds a command or stage: environment, output and code lead it nowhere else."""

import ast
import getpass
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlplora.edge import cleaned, refuse_other_code
from dlplora.errors import DlpLoraError

SETTINGS = {"GIT_CONFIG_PARAMETERS", "GIT_CONFIG_COUNT"}  # of one command; they name no place


def test_what_git_calls_local_to_a_repository_is_dropped() -> None:
    words = ["git", "rev-parse", "--local-env-vars"]
    listed = set(subprocess.run(words, capture_output=True, encoding="utf-8").stdout.split())
    assert listed > SETTINGS
    kept = cleaned(dict.fromkeys(listed, "elsewhere"))
    assert listed & kept.keys() == SETTINGS


def test_nothing_else_of_an_environment_is_dropped() -> None:
    given = {"PATH": "/bin", "GIT_SSH_COMMAND": "ssh", "NO_COLOR": "1", "HTTP_PROXY": "http://x"}
    assert given.items() <= cleaned(given).items()
    astray = ("FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "PYTHONSAFEPATH")
    assert not cleaned(dict.fromkeys(astray, "1")).keys() & set(astray)


def test_a_user_without_a_name_or_home_gets_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as in a container: KeyError
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    clean = cleaned(os.environ)
    assert clean["LOGNAME"] == f"uid{os.getuid()}"
    assert Path(clean["HOME"]).is_relative_to(tmp_path)
    assert Path(clean["HOME"]).is_dir()


@pytest.mark.parametrize(
    "surroundings",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_what_an_output_cannot_show_is_escaped_and_no_error(
    root: Path, surroundings: dict[str, str]
) -> None:
    script = (
        "import subprocess, sys; from dlplora.edge import set_up_process; set_up_process();"
        "word = chr(8212) + chr(0xdcff); print(word); print(word, file=sys.stderr, flush=True);"
        "subprocess.run([sys.executable, '-c', 'print(chr(8212))'], check=True)"
    )
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env=plain | surroundings,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u2014\\udcff" in done.stderr
    assert done.stdout.count(b"\\u2014") == 2


def test_code_of_another_checkout_is_refused_in_one_line(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_other_code()  # no project
    (tmp_path / "dlplora").mkdir()
    refuse_other_code()  # a folder that has no code of ours
    (tmp_path / "dlplora/edge.py").touch()
    with pytest.raises(DlpLoraError, match=r"this code would run in .*; unset PYTHONSAFEPATH"):
        refuse_other_code()
    monkeypatch.chdir(root)
    refuse_other_code()


def used_names(file: Path) -> Iterator[str]:
    """Yield what a module imports and every name that stands in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (imported.name for imported in node.names)


def test_only_the_edge_prints_or_draws(root: Path) -> None:
    package = root / "dlplora"
    users = {
        file.relative_to(package).parts[0]
        for file in package.rglob("*.py")
        if {"print", "rich"} & {name.partition(".")[0] for name in used_names(file)}
    }
    assert users == {"edge.py", "stage.py", "cli"}
