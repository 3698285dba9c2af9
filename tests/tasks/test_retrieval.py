"""Real `dvc repro` of retrieval: what a new task embeds, and that it trains nothing."""

import shutil
from collections.abc import Iterator

import pytest
import yaml

from dlplora import warm
from tests.embedders import write_tiny_embedder
from tests.tasks.test_pipeline import CODE, ROOT, Checkout, params
from tests.tiny import choices, opposites, write_raw, write_tiny_folder

RETRIEVER = "embedding_router@retriever"
INDEXED = {"index@opposites", "index@colours"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    folder = tmp_path_factory.mktemp("retrieval")
    root = folder / "project"
    root.mkdir()
    for name in CODE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, root / name)
    values = params(write_tiny_folder(folder / "tiny_base"), folder / "tiny_base")
    sha256 = write_tiny_embedder(folder / "tiny_embedder")
    values |= {
        "embedders": {
            "tiny": {"kind": "folder", "path": str(folder / "tiny_embedder"), "sha256": sha256}
        },
        "tuned_embedders": {
            "tuned": {
                "embedder": "tiny",
                "tasks": ["opposites", "colours"],
                "temperature": 0.1,
                "learning_rate": 0.001,
                "warmup_steps": 0,
                "steps": 2,
                "batch_size": 8,
                "validate_every": 1,
                "patience": None,
            }
        },
        "index": {"inputs": 5, "instruction": "say : "},
        "indexes": {"opposites": {}, "colours": {}},
        "embedding_routers": {
            "retriever": {
                "kind": "retriever",
                "embedder": "tuned",
                "similarity": "cosine",
                "temperature": 0.05,
            }
        },
    }
    write_raw(root / "suites/opposites.json", opposites(70))
    write_raw(root / "suites/colours.json", choices(70))
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with warm.server_for(root) as told:
        checkout = Checkout(root, told)
        checkout.run("git", "init", "-q")
        checkout.run("dvc", "init", "-q")
        yield checkout


def repro(project: Checkout) -> set[str]:
    """Bring the retriever and what it needs up to date; return the stages that really ran."""
    told = project.run("dvc", "repro", RETRIEVER).stdout
    return {line.split("'")[1] for line in told.splitlines() if line.startswith("Running stage")}


def test_a_new_task_embeds_its_adapter_and_trains_nothing(project: Checkout) -> None:
    first = repro(project)
    assert INDEXED | {"embedder@tiny", "tuned_embedder@tuned", RETRIEVER} <= first
    before = project.hashes()

    write_raw(project.root / "suites/letters.json", opposites(70, start=900))

    def add(values: dict[str, dict[str, object]]) -> None:
        values["unseen_tasks"] = {}
        values["tasks"]["letters"] = {**values["tasks"]["opposites"], "raw": "suites/letters.json"}  # type: ignore[dict-item]
        values["adapters"]["letters"] = {}
        values["indexes"]["letters"] = {}

    project.edit(add)
    second = repro(project)

    assert second == {
        "ingest@letters",
        "retriever_data@tuned",  # the tasks that it draws from are those they were
        "router_data",  # for the figures on held-out questions
        "index@letters",
        RETRIEVER,
    }
    after = project.hashes()
    assert after["data/index/letters.safetensors"]
    for path in before:
        if path.startswith(("data/index", "data/embedders", "data/retriever_data")):
            assert after[path] == before[path], path


def test_a_change_of_its_training_questions_embeds_that_task_again(project: Checkout) -> None:
    before = project.hashes()
    write_raw(project.root / "suites/letters.json", opposites(60, start=1900))

    assert "index@letters" in repro(project)

    after = project.hashes()
    changed = {
        path for path in before if path.startswith("data/index") and after[path] != before[path]
    }
    assert changed == {"data/index/letters.safetensors"}
