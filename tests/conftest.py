"""What all tests share: quiet libraries, one place to compute, finished projects, tiers."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from absl.logging import get_absl_handler

os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from dlplora import warm
from tests.device import choose_device
from tests.project import ROOT, Checkout, made_once, make_finished, make_learned, make_methods

# The background job of a shell ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The handler of absl, which rouge-score brings, closes its stream when logging is configured anew,
# unless that is the stderr of that moment: it would close the file that pytest captures in.
get_absl_handler().python_handler.setStream(sys.__stderr__)

# What runs DVC, Prefect or other processes, trains, or tries many kinds of models or inputs; the
# longest first, so that two processes end together. All other tests are marked `fast`.
SLOW = (
    "tests/tasks/test_pipeline.py",
    "tests/tasks/",
    "tests/app/test_journey.py",
    "tests/flows/",
    "tests/app/",
    "tests/lifecycle/test_retrain.py",
    "tests/lifecycle/test_storage.py",
    "tests/test_project.py",
    "tests/training/",
    "tests/test_warm.py",
    "tests/data/test_ingest.py",
    "tests/test_fingerprints.py",
    "tests/test_families.py",
    "tests/data/test_ingest_properties.py",
    "tests/lora/test_fused.py",
    "tests/engine/test_batch.py",
    "tests/engine/test_probe.py",
    "tests/evaluation/test_answer_store.py",
    "tests/test_runtime.py",
    "tests/test_cli.py",
    "tests/test_docs.py",
)
torch.set_num_threads(2)  # for fixtures that are made before a test's own


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the choice of the device."""
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the tests' models and their inputs are; on cuda most tests run as on a GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the device before any test is imported."""
    choose_device(config.getoption("device"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast tests and put them behind the slow ones."""
    places = {}
    for item in items:
        slow = [place for place, start in enumerate(SLOW) if item.nodeid.startswith(start)]
        places[item] = min(slow, default=len(SLOW))
        if not slow:
            item.add_marker("fast")
    items.sort(key=places.__getitem__)


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


@pytest.fixture(scope="session")
def learned(shared: Path) -> Path:
    """A small project that answers all right, its first version in production. Only copied."""
    return made_once(shared / "learned", make_learned)


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


@pytest.fixture
def learned_project(learned: Path, tmp_path: Path) -> Checkout:
    """A copy of the learned project, without a server: retrains start their own."""
    return Checkout(shutil.copytree(learned, tmp_path / "project", symlinks=True))
