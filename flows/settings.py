"""Where Prefect keeps its state and which server it talks to, unless the environment says so."""

import os
from pathlib import Path

from dlplora.scratch import is_held

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / ".scratch"
UI_LOCK = "prefect ui"  # held by `flows.ui` for as long as its server is there
API_FILE = SCRATCH / "prefect" / "api"  # the address of that server


def set_up_prefect() -> None:
    """Set what Prefect reads of the environment, before it is imported.

    Its state stands in `.scratch/prefect`, nothing is reported to anybody, and flows talk to the
    server of `flows.ui` while that is open, else to one that starts and ends with them.
    """
    chosen = {
        "PREFECT_HOME": str(SCRATCH / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "DO_NOT_TRACK": "1",
    }
    if is_held(UI_LOCK, scratch=SCRATCH):
        chosen["PREFECT_API_URL"] = API_FILE.read_text(encoding="utf-8").strip()
    for name, value in chosen.items():
        os.environ.setdefault(name, value)
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect makes no parents
