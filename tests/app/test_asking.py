"""The page Ask in a real browser, with a real server of a tiny model."""

import csv
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from dlplora.app.model_client import ModelClient
from tests.answering import write_answering_project
from tests.app.browser import Browser
from tests.app.running import app_of
from tests.project import ROOT
from tests.serving.running import running
from tests.tiny import write_raw
from tests.waiting import until

QUESTION = "left right up ?"


class Opened(NamedTuple):
    browser: Browser
    client: ModelClient
    root: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """The addresses of app and server, and their project."""
    root = tmp_path_factory.mktemp("asking") / "project"
    write_answering_project(ROOT, root)
    with (
        running(root / "data") as server,
        app_of(root, root.parent / "app", model_url=server.url) as (address, _),
    ):
        yield address, server.url, root


@pytest.fixture
def opened(window: Browser, served: tuple[str, str, Path]) -> Iterator[Opened]:
    address, url, root = served
    window.turn_to(address)
    window.size(1280, 1400)
    window.open("ask")
    window.sees("data: 2 adapters, routed by dlp_mlp")
    with closing(ModelClient(url)) as client:
        yield Opened(window, client, root)


def test_a_chat_is_answered_with_its_adapters_and_the_command(opened: Opened) -> None:
    browser = opened.browser
    browser.fill("Question", QUESTION)
    browser.click("Send")
    alone = opened.client.answer("dlp_mlp", QUESTION, max_completion_tokens=128)
    assert browser.answer() == alone.text.strip()
    browser.sees("dlplora generate --system dlp_mlp --max-new-tokens 128 --trace")
    browser.click("New chat")
    until(lambda: browser.legend() == [], within=10)


def test_systems_stand_side_by_side(opened: Opened) -> None:
    browser, client = opened.browser, opened.client
    browser.tab("Side by side")
    browser.fill("Question", QUESTION)
    browser.click("Ask all")
    browser.sees("--compare dlp_mlp,single:opposites")
    for name in ("dlp_mlp", "single:opposites"):
        reply = client.answer(name, QUESTION, max_completion_tokens=128)
        assert reply.parts[0]["text"].strip() in browser.text


def test_a_mix_has_the_weights_of_its_sliders(opened: Opened) -> None:
    browser = opened.browser
    browser.tab("Mix")
    browser.fill("Question", QUESTION)
    browser.fill("number input for Weight of colours", "0.5")
    browser.click("Answer by this mix")
    browser.sees("opposites 1 + colours 0.5")
    browser.sees('"scale": 0.5')


def test_options_are_scored(opened: Opened) -> None:
    browser = opened.browser
    browser.tab("Options")
    browser.fill("Question", QUESTION)
    browser.fill("Options, one a line", "red")
    browser.click("Score")
    browser.sees("options")
    browser.fill("Options, one a line", "red\nblue")
    browser.click("Score")
    best = opened.client.score("dlp_mlp", QUESTION, ["red", "blue"])["best"]
    browser.sees(f"The likeliest is '{best}'.")


def test_a_text_is_routed_with_probabilities(opened: Opened) -> None:
    browser = opened.browser
    browser.open("routers")
    browser.tab("Try a text")
    browser.fill("Text", QUESTION)
    browser.click("Route")
    found = opened.client.route("dlp_mlp", QUESTION)
    browser.sees(f"confidence {found['confidence']:.2f}")
    likeliest = max(found["probabilities"], key=found["probabilities"].get)
    browser.sees(f"{likeliest}\n{found['probabilities'][likeliest]:.0%}")


def test_a_file_is_answered_and_its_table_can_be_downloaded(opened: Opened, tmp_path: Path) -> None:
    browser = opened.browser
    items = [{"Q": "which colour : one ?", "A": "red", "options": ["red", "blue"]}] * 2
    items += [{"Q": "up " * 300, "A": "x"}, {"Q": QUESTION, "A": "x"}]  # one that is too long
    file = tmp_path / "asked.json"
    write_raw(file, items)
    browser.tab("File")
    browser.upload("Questions and answers", file)
    browser.click("Answer all")
    browser.sees("4 of 4 answered")
    browser.sees("refused:")
    written = max(
        opened.root.glob(".scratch/app/*/answers.csv"), key=lambda one: one.stat().st_size
    )
    with written.open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["question"] for row in rows] == [str(item["Q"]) for item in items]
    file.write_text(json.dumps([{"Q": "one"}]))
    browser.driver.refresh()
    browser.tab("File")
    browser.upload("Questions and answers", file)
    browser.click("Answer all")
    browser.sees("asked.json: item 1 has no answer")


def test_the_pages_answer_while_a_long_work_is_stopped(opened: Opened, tmp_path: Path) -> None:
    browser = opened.browser
    file = tmp_path / "many.json"
    write_raw(file, [{"Q": f"{QUESTION} {n}", "A": "x"} for n in range(400)])
    browser.tab("File")
    browser.upload("Questions and answers", file)
    browser.click("Answer all")
    browser.sees("of 400 answered")
    browser.click("Stop")
    assert httpx.get(browser.address, timeout=2.0).status_code == 200
