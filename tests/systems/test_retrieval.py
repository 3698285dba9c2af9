"""An engine and a command that route by retrieval, from a pipeline's folder."""

import json
import sys
from pathlib import Path

import pytest
import yaml

import dlplora
from dlplora import cli
from dlplora.params.systems import TopK
from dlplora.records.router_card import write_fallback
from dlplora.routing.embedding import Embedder
from dlplora.routing.retriever import RetrievalRouter, Retriever
from tests.answering import TASKS, system_entry, write_answering_project
from tests.device import device
from tests.embedders import write_tiny_embedder

ROOT = Path(__file__).parent.parent.parent
NEAREST = TopK(k=1, weights="equal")
TEXTS = ["say red", "what is the opposite of up ?", "say blue", "one plus two"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Retriever]:
    """A project with a retriever among its routers, and that retriever."""
    folder = tmp_path_factory.mktemp("project")
    write_answering_project(ROOT, folder)
    write_tiny_embedder(folder / "embedder")
    embedder = Embedder.load(folder / "embedder", device=device())
    means = embedder.embed(["say red", "what is the opposite of up ?"], normalise=False)
    retriever = Retriever(embedder, TASKS, means, "", "cosine", 0.1)
    (folder / "data/routers/near").mkdir()
    retriever.save(folder / "data/routers/near")
    write_fallback(folder / "data/routers/near", 0.0)
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["routers"]["near"] = values["routers"]["mlp"]
    values["systems"]["nearest"] = system_entry(
        "top_k", adapters="data/adapters", router="data/routers/near", **NEAREST.model_dump()
    )
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return folder, retriever


def test_an_engine_routes_by_the_retriever_of_its_folder(made: tuple[Path, Retriever]) -> None:
    folder, retriever = made

    engine = dlplora.Engine.load(folder / "data", system="nearest")

    assert engine.route(TEXTS) == RetrievalRouter(retriever, NEAREST).route(TEXTS)
    (answer,) = engine.generate(["say red"], sampling=dlplora.Sampling(max_new_tokens=3))
    assert answer.sentences[0].route.adapters == ("colours",)


@pytest.mark.parametrize("text", TEXTS)
def test_the_command_shows_the_route_as_sure_as_its_probability(
    made: tuple[Path, Retriever],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, retriever = made
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["dlplora", "route", text, "--system", "nearest", "--json"])

    with pytest.raises(SystemExit) as ended:
        cli.main()

    told = json.loads(capsys.readouterr().out)
    assert not ended.value.code
    (row,) = retriever.probabilities([text])
    assert told["route"]["confidence"] == pytest.approx(row.max())
    assert told["probabilities"] == pytest.approx(dict(zip(TASKS, row, strict=True)))
