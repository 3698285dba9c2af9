"""Where Prefect keeps its state and which server it talks to."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from dlplora.edge import one_line_errors
from dlplora.errors import DlpLoraError
from dlplora.scratch import is_held

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / ".scratch"
UI_LOCK = "prefect ui"  # held by `flows.ui` for as long as its server is there
HOME = SCRATCH / "prefect"
API_FILE = HOME / "api"  # the address of that server
_STATE = ("PREFECT_HOME", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def set_up_prefect() -> None:
    """Set what Prefect reads of the environment, before it is imported.

    Its state stands in `.scratch/prefect` and nowhere else: a home, profile or database that the
    environment names may be of another version, which this one would migrate. Nothing is
    reported to anybody. Flows talk to the server of PREFECT_API_URL if it is set, to that of
    `flows.ui` while that is open, else to one that starts and ends with them.
    """
    with one_line_errors():
        _refuse_socks(os.environ)
    for name in list(os.environ):
        if name in _STATE or (name.startswith("PREFECT_") and "_DATABASE_" in name):
            del os.environ[name]
    chosen = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "dlplora",  # what the library says is of the run's log
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_HOME": str(HOME),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{HOME / 'prefect.db'}",
    }
    if is_held(UI_LOCK, scratch=SCRATCH) and (api := own_api()):
        chosen["PREFECT_API_URL"] = api
    for name, value in chosen.items():
        os.environ.setdefault(name, value)
    os.environ.update(without_proxy_on_loopback(os.environ))
    HOME.mkdir(parents=True, exist_ok=True)  # Prefect makes no parents


def has_own_server() -> bool:
    """Tell whether flows talk to a server of this project alone, `flows.ui`'s or their own."""
    url = os.environ.get("PREFECT_API_URL")
    return not url or url == own_api()


def own_api() -> str | None:
    """Return the address of `flows.ui`'s server; there is none while it opens or closes."""
    return API_FILE.read_text(encoding="utf-8").strip() if API_FILE.is_file() else None


def _refuse_socks(environment: Mapping[str, str]) -> None:
    """Raise if Prefect's client would look for a package that is not there, whatever it asks."""
    for name in (*_PROXIES, *map(str.upper, _PROXIES)):
        is_socks = environment.get(name, "").lower().startswith("socks")
        if is_socks and find_spec("socksio") is None:
            raise DlpLoraError(
                f"{name} names a SOCKS proxy, for which Prefect needs the package socksio; "
                f"install it (`pip install socksio`), or unset {name} for flows"
            )


def without_proxy_on_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep requests to this machine itself from its proxy."""
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES):
        return {}
    told = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    hosts = [host for host in told.split(",") if host.strip()]
    listed = ",".join([*hosts, *(host for host in _LOOPBACK if host not in hosts)])
    return {} if told.strip() == "*" else {"no_proxy": listed, "NO_PROXY": listed}
