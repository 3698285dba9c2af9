"""Where Prefect keeps its state and whom it asks, whatever the environment says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.settings import without_proxy_on_loopback
from tests.flows.dummies import ROOT

PROXY = "http://proxy.example:3128"
TELLS = "import os, flows; print(*sorted(f'{k}={v}' for k, v in os.environ.items()), sep='\\n')"


def told(surroundings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Import the flows in another process, which prints its environment then."""
    environment = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
    return subprocess.run(
        [sys.executable, "-c", TELLS],
        cwd=ROOT,
        env=environment | surroundings,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_the_state_is_this_checkouts_and_no_foreign_one_is_touched(tmp_path: Path) -> None:
    foreign = tmp_path / "home"
    foreign.mkdir()
    database = f"sqlite+aiosqlite:///{foreign / 'prefect.db'}"
    said = told(
        {
            "PREFECT_HOME": str(foreign),
            "PREFECT_PROFILE": "elsewhere",
            "PREFECT_PROFILES_PATH": str(foreign / "profiles.toml"),
            "PREFECT_API_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_DATABASE_DRIVER": "postgresql+asyncpg",
            "PREFECT_API_URL": "http://prefect.example/api",
        }
    ).stdout.splitlines()
    assert not [line for line in said if str(foreign) in line]
    assert f"PREFECT_HOME={ROOT / '.scratch/prefect'}" in said
    assert not [line for line in said if line.startswith(("PREFECT_PROFILE", "PREFECT_API_DATA"))]
    assert not [line for line in said if "postgresql" in line]
    assert "PREFECT_API_URL=http://prefect.example/api" in said  # a wish
    assert list(foreign.iterdir()) == []


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_loopback_is_never_asked_by_a_proxy(name: str) -> None:
    added = without_proxy_on_loopback({name: PROXY, "NO_PROXY": "intranet.example"})
    assert added["no_proxy"] == added["NO_PROXY"] == "intranet.example,127.0.0.1,localhost,::1"
    assert without_proxy_on_loopback(added | {name: PROXY}) == added


def test_where_no_proxy_is_nothing_is_said_of_one() -> None:
    assert without_proxy_on_loopback({}) == {}
    assert without_proxy_on_loopback({"HTTP_PROXY": ""}) == {}
    assert without_proxy_on_loopback({"HTTP_PROXY": PROXY, "no_proxy": "*"}) == {}


def test_a_proxy_that_prefect_cannot_use_is_one_line() -> None:
    done = told({"ALL_PROXY": "socks5://user:secret@proxy.example:1080"})
    assert done.returncode == 1
    assert done.stderr.startswith("error: ALL_PROXY names a SOCKS proxy, for which Prefect needs")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
