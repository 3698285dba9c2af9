"""Real `dvc repro` of retrieval: what a new task embeds, and that it trains nothing."""

from tests.project import Checkout
from tests.tiny import opposites, write_raw

RETRIEVER = "embedding_router@retriever"


def test_a_new_task_embeds_its_adapter_and_trains_nothing(project_of_methods: Checkout) -> None:
    project = project_of_methods
    before = project.hashes()
    write_raw(project.root.parent / "signs.json", opposites(70, start=1500))
    project.cli("add-task", "signs", str(project.root.parent / "signs.json"))
    assert project.repro(RETRIEVER) == {
        "ingest@signs",
        "retriever_data@tuned",  # the tasks that it draws from are those they were
        "router_data",  # for the figures on held-out questions
        "index@signs",
        RETRIEVER,
    }
    added = project.hashes()
    for path in before:
        if path.startswith(("data/index", "data/embedders", "data/retriever_data")):
            assert added[path] == before[path], path

    write_raw(project.root / "data/raw/signs/signs.json", opposites(60, start=1900))
    assert "index@signs" in project.repro(RETRIEVER)
    changed = {path for path, md5 in project.hashes().items() if md5 != added[path]}
    indexed = {path for path in changed if path.startswith("data/index")}
    assert indexed == {"data/index/signs.safetensors"}
