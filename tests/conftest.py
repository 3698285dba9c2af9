"""What all tests share: quiet libraries, one place to compute, finished projects."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from dlplora import warm
from tests.project import ROOT, Checkout, made_once, make_finished, make_methods

# The background job of a shell ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ("tasks", "flows")
torch.set_num_threads(2)  # for fixtures that are made before a test's own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that two processes end together."""
    order = {folder: place for place, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))


@pytest.fixture
def root() -> Path:
    """The checkout under test."""
    return ROOT


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of the tests share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def finished(shared: Path) -> Path:
    """A project whose pipeline has run. It is only read and copied."""
    return made_once(shared / "finished", make_finished)


@pytest.fixture(scope="session")
def methods(shared: Path, finished: Path) -> Path:
    """The same with experts, baselines and retrieval."""
    return made_once(shared / "methods", lambda root: make_methods(root, finished))


def _copy(root: Path, to: Path) -> Iterator[Checkout]:
    shutil.copytree(root, to)
    with warm.server_for(to) as told:
        yield Checkout(to, told)


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Iterator[Checkout]:
    """A copy of the finished project."""
    yield from _copy(finished, tmp_path / "project")


@pytest.fixture
def project_of_methods(methods: Path, tmp_path: Path) -> Iterator[Checkout]:
    """A copy of the finished project with all methods."""
    yield from _copy(methods, tmp_path / "project")
