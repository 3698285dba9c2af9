"""The edge of a command or stage: a user's mistake is one line on stderr and exit code 1."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from dlplora.errors import DlpLoraError, is_disk_full


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line and exit code 1 on a user's mistake or a full disk."""
    try:
        yield
    except DlpLoraError as error:
        fail(error)
    except Exception as error:
        if not is_disk_full(error):
            raise
        fail(DlpLoraError(f"no space left on the disk: {error}; free some and run again"))


def fail(error: DlpLoraError) -> None:
    """End the process with one line on stderr and exit code 1."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(1)
