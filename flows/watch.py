"""Tell Prefect when files are put into data/inbox; prefect.yaml says what that starts.

python -m flows.watch
"""

from prefect.events import emit_event
from watchfiles import watch

from dlplora.lifecycle.inbox import INBOX, files_in
from flows.settings import ROOT


def emit() -> None:
    """Emit the event, if any file is there; who takes files looks into the folder itself."""
    if files := files_in(ROOT):
        emit_event(
            "dlplora.inbox.changed",
            resource={"prefect.resource.id": "dlplora.inbox"},
            payload={"files": [file.name for file in files]},
        )


def main() -> None:
    """Watch until the process is ended; files that were there before count as well."""
    (ROOT / INBOX).mkdir(parents=True, exist_ok=True)
    emit()
    for _ in watch(ROOT / INBOX, recursive=False):
        emit()


if __name__ == "__main__":
    main()
