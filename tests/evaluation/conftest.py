"""What tests of evaluation share."""

from pathlib import Path

import pytest
import torch

from dlplora.params.load import load_params
from tests.answering import write_answering_project
from tests.evaluation.built import Built
from tests.tiny import tiny_base

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A project with a system of every kind, over a base model that ends answers and lines."""
    folder = tmp_path_factory.mktemp("project")
    write_answering_project(ROOT, folder)
    base = tiny_base(lines=True)
    with torch.no_grad():
        base.model.get_output_embeddings().weight[min(base.end_ids)] *= -2
    return Built(folder, load_params(folder / "params.yaml"), base)
