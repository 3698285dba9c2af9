"""How DVC and git are started: by this interpreter, here, and failures tell their own reason."""

import os
import sys
from pathlib import Path

import pytest

from dlplora.project import commands
from dlplora.project.commands import CommandError, environment, git, own_site_cache


def test_stages_find_this_interpreter_first_and_no_other_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", "/nosuch")
    monkeypatch.setenv("FORCE_COLOR", "1")
    told = environment(tmp_path)
    assert told["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert not {"GIT_DIR", "FORCE_COLOR"} & told.keys()
    assert told["PYTHONUTF8"] == "1"


def test_a_site_cache_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_SITE_CACHE_DIR", raising=False)
    (tmp_path / "taken").touch()  # where nobody can make a folder, not even root
    monkeypatch.setattr(commands, "_SHARED_CACHE", tmp_path / "taken/dvc/repo")
    own = tmp_path / "project/.scratch/dvc"
    assert own_site_cache(tmp_path / "project") == own
    assert environment(tmp_path / "project")["DVC_SITE_CACHE_DIR"] == str(own)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", "/chosen")
    assert environment(tmp_path / "project")["DVC_SITE_CACHE_DIR"] == "/chosen"
    monkeypatch.setattr(commands, "_SHARED_CACHE", tmp_path / "dvc/repo")
    assert own_site_cache(tmp_path / "project") is None


def test_a_command_that_is_not_there_or_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CommandError, match=r"^git log: fatal: not a git repository") as caught:
        git(tmp_path, "log")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandError, match=r"^git log: .*No such file or directory: 'git'"):
        git(tmp_path, "log")
