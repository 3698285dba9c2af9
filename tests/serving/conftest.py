"""One tiny project and one server over it, for all tests that change nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dlplora.systems.engine import Engine
from tests.answering import write_answering_project
from tests.project import ROOT
from tests.serving.running import PLACE, SETTINGS, Running, running


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a tiny project."""
    folder = tmp_path_factory.mktemp("served")
    write_answering_project(ROOT, folder)
    return folder / "data"


@pytest.fixture(scope="session")
def engine(data: Path) -> Iterator[Engine]:
    """The engine whose answers the server's must equal."""
    first, *others = SETTINGS.systems
    with Engine.load(data, system=first, systems=others, place=PLACE) as engine:
        yield engine


@pytest.fixture(scope="session")
def server(data: Path) -> Iterator[Running]:
    """A server over the same data."""
    with running(data) as server:
        yield server
