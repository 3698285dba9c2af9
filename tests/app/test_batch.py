"""Files that are answered: read whole or refused, answered as one by one, scored as stages do."""

import csv
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dlplora.app.batch import answer_all, read_file, summary_of, write_csv
from dlplora.app.model_client import ModelClient, ServerError
from dlplora.errors import DataError
from dlplora.evaluation.metrics import exact_match
from dlplora.systems.engine import Engine
from tests.answering import write_answering_project
from tests.project import ROOT
from tests.serving.running import PLACE, Running, running
from tests.tiny import write_raw

ITEMS = [
    {"Q": "what is the opposite of up ?", "A": "down"},
    {"Q": "left right ?", "A": ["a", "b"]},
    {"Q": "which colour : one ?", "A": "red", "options": ["red", "blue"]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answering")
    write_answering_project(ROOT, root)
    return root / "data"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(folder) as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[ModelClient]:
    with closing(ModelClient(server.url)) as found:
        yield found


def test_a_file_is_answered_as_the_engine_answers_item_by_item(
    client: ModelClient, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "items.json"
    write_raw(file, ITEMS)
    items = read_file(file, most=10)
    done = list(answer_all(client, "dlp_mlp", items, max_tokens=6))
    with Engine.load(folder, system="dlp_mlp", place=PLACE) as engine:
        route = engine.route([str(ITEMS[2]["Q"])])[0]
        best = engine.score(str(ITEMS[2]["Q"]), ["red", "blue"], route=route).best
    alone = [
        list(client.stream("dlp_mlp", [{"role": "user", "content": str(one["Q"])}],
                           max_completion_tokens=6))[-1].text
        for one in ITEMS[:2]
    ]  # fmt: skip
    assert [one.answer for one in done] == [*alone, best]
    assert [one.exact_match for one in done] == [
        exact_match(one.answer, item.answers) for one, item in zip(done, items, strict=True)
    ]
    assert summary_of(done).startswith("3 items: exact match ")
    write_csv(tmp_path / "out.csv", done)
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as written:
        rows = list(csv.DictReader(written))
    assert [row["answer"] for row in rows] == [one.answer for one in done]
    assert rows[1]["expected"] == "a | b"


def test_a_bad_item_an_empty_file_and_too_many_items_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('{"Q": "one", "A": "x"}\n{"Q": "", "A": "x"}\n')
    with pytest.raises(DataError, match=r"items\.jsonl: line 2 has an empty 'Q'"):
        read_file(file, most=10)
    with pytest.raises(DataError, match="more than 1 lines"):
        read_file(file, most=1)
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no"):
        read_file(file, most=10)


def test_a_server_that_is_gone_is_told_in_one_line(tmp_path: Path) -> None:
    with closing(ModelClient("http://127.0.0.1:9")) as client:
        for ask in (
            client.served,
            lambda: client.route("base", "a"),
            lambda: client.score("base", "a", ["b", "c"]),
            lambda: client.answer("base", "a"),
        ):
            with pytest.raises(ServerError, match=r"^the model's server does not answer$"):
                ask()


def test_what_the_server_refuses_is_told_in_its_own_words(client: ModelClient) -> None:
    with pytest.raises(ServerError, match="nobody"):
        list(client.stream("nobody", [{"role": "user", "content": "a"}]))
    with pytest.raises(ServerError, match="option"):
        client.score("dlp_mlp", "a", ["b"])


def test_what_is_served_is_told_with_the_default_first(client: ModelClient) -> None:
    served = client.served()
    assert served.systems[0] == "dlp_mlp"
    assert served.systems[-1] == "base"
    assert served.adapters == ("colours", "opposites")
    assert served.version == "data"


def test_an_answer_comes_in_pieces_and_ends_with_its_route(client: ModelClient) -> None:
    asked = [{"role": "user", "content": "left right up ?"}]
    replies = list(client.stream("dlp_mlp", asked, max_completion_tokens=6))
    assert all(new.text.startswith(old.text) for old, new in itertools.pairwise(replies))
    assert set(replies[-1].parts[0]["adapters"]) <= {"colours", "opposites"}
    mix = {"colours": 0.5, "opposites": 0.25}
    (*_, mixed) = client.stream("dlp_mlp", asked, mix=mix, max_completion_tokens=6)
    assert mixed.parts[0]["adapters"] == mix
