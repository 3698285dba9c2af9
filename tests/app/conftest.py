"""One browser for all tests of the pages."""

import os
from collections.abc import Iterator

import pytest

from tests.app.browser import CHROMIUM, DRIVER, Browser, browsing


@pytest.fixture(scope="session")
def window() -> Iterator[Browser]:
    """A window of a browser; CI has to have one."""
    if not (CHROMIUM.exists() and DRIVER.exists()) and not os.environ.get("CI"):
        pytest.skip("no chromium: apt-get install chromium chromium-driver")
    with browsing() as browser:
        yield browser
