"""One Prefect server for all tests, with a home of its own."""

import os
import tempfile
from collections.abc import Iterator

import pytest

import flows  # noqa: F401 – it chooses Prefect's home, in the checkout; tests have another one

os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-")
os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = (
    f"sqlite+aiosqlite:///{os.environ['PREFECT_HOME']}/prefect.db"
)

from prefect.testing.utilities import prefect_test_harness

from flows import shown


@pytest.fixture(scope="session", autouse=True)
def server() -> Iterator[None]:
    """The server that flows of these tests talk to."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(autouse=True, scope="session")
def _reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shown, "REPORTS", tmp_path_factory.mktemp("reports"))
        yield
