"""Each page in a real browser, without a model and without Prefect: the runs are a test's own."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from dlplora.records.training import read_adapter_training
from tests.app.browser import Browser, browsing
from tests.app.running import TOLD, FakeRuns, app_of
from tests.tiny import opposites, write_raw
from tests.waiting import until

DRAWN = {  # what stands on each page once it is drawn
    "": "none so far",
    "data": "capitals.json",
    "adapters": "trained",
    "routers": "mini-MLP",
    "ask": "no model is trained yet",
    "runs": "All runs",
    "models": "No model is registered yet",
}


class Served(NamedTuple):
    root: Path
    address: str
    runs: FakeRuns


class Opened(NamedTuple):
    browser: Browser
    runs: FakeRuns
    root: Path


@pytest.fixture(scope="module")
def served(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The app of a finished project."""
    folder = tmp_path_factory.mktemp("app")
    root = shutil.copytree(finished, folder / "project")
    with app_of(root, folder / "app") as (address, runs):
        yield Served(root, address, runs)


@pytest.fixture
def opened(window: Browser, served: Served) -> Opened:
    """A browser at the app."""
    window.turn_to(served.address)
    window.size(1280, 1400)
    return Opened(window, served.runs, served.root)


def test_every_page_fits_a_narrow_window_and_asks_nobody_but_the_app(opened: Opened) -> None:
    browser = opened.browser
    for width, dark in ((1280, False), (390, True)):
        browser.size(width, 844, dark=dark)
        for page in DRAWN:
            browser.open(page)
            browser.sees(DRAWN[page])
            wide = browser.driver.execute_script(
                "return document.documentElement.scrollWidth - window.innerWidth"
            )
            assert wide <= 0, (page, width)
            is_dark = "dark" in browser.driver.execute_script("return document.body.className")
            assert is_dark == dark
    asked = {url for url in browser.requested() if not url.startswith(("data:", "blob:"))}
    assert {url for url in asked if not url.startswith(browser.address)} == set()


def test_every_field_has_a_label(opened: Opened) -> None:
    browser = opened.browser
    for page in DRAWN:
        browser.open(page)
        unnamed = browser.driver.execute_script(
            "return [...document.querySelectorAll('input, textarea, select, button')]"
            ".filter(e => e.offsetParent && e.type != 'file' && !e.closest('label')"
            " && !e.labels?.length && !e.ariaLabel && !e.title && !e.textContent.trim())"
            ".map(e => e.outerHTML)"
        )
        assert unnamed == [], page


def test_a_bad_file_is_told_item_by_item_and_a_good_one_becomes_a_task(
    opened: Opened, tmp_path: Path
) -> None:
    browser, root = opened.browser, opened.root
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{"Q": "one", "A": "", "<b>": ""}, {"Q": "two", "<i>": "x"}]))
    browser.open("data")
    browser.upload("File of questions and answers", bad)
    browser.click("Check")
    browser.sees("has an empty 'A'")
    browser.sees("item 1")
    browser.sees("<i>")  # a text, and no markup
    good = tmp_path / "antonyms.json"
    write_raw(good, opposites(70))
    browser.open("data")
    browser.upload("File of questions and answers", good)
    browser.click("Check")
    browser.sees("antonyms.json is good")
    browser.fill("Name of the task", "1st")
    browser.click("Add task")
    browser.sees("cannot name a task")
    browser.fill("Name of the task", "antonyms")
    browser.click("Add task")
    browser.sees("added antonyms")
    browser.sees("dlplora add-task antonyms")
    assert "antonyms" in yaml.safe_load((root / "params.yaml").read_text())["tasks"]
    assert json.loads((root / "data/raw/antonyms/antonyms.json").read_text())


def test_a_file_for_the_inbox_lies_there_and_is_listed(opened: Opened, tmp_path: Path) -> None:
    browser, root = opened.browser, opened.root
    file = tmp_path / "inverses.json"
    write_raw(file, opposites(70))
    browser.open("data")
    browser.upload("File of questions and answers", file)
    browser.click("Put into the inbox")
    browser.sees("a retrain takes it in")
    assert (root / "data/inbox/inverses.json").read_bytes() == file.read_bytes()
    browser.tab("Tasks and inbox")
    browser.click("Refresh")
    browser.sees("a new task")


def test_router_data_is_drawn_as_a_run_and_prompts_are_shown(opened: Opened) -> None:
    browser = opened.browser
    browser.open("data")
    browser.tab("Several questions")
    browser.click("Preview")
    browser.sees("5 prompts.")
    assert "1. " in browser.text
    browser.tab("Router data")
    browser.sees("colours")
    browser.fill("Questions per task", "12")
    browser.click("Draw router data")
    browser.sees("The run has started")
    (run,) = opened.runs.recent(1)
    assert (run.deployment, run.parameters) == ("pipeline/this-tree", {"targets": ["router_data"]})
    params = yaml.safe_load((opened.root / "params.yaml").read_text())
    assert params["balance"]["per_task"] == 12


def test_a_training_is_found_again_by_a_reload_and_by_another_browser(opened: Opened) -> None:
    browser, runs = opened.browser, opened.runs
    browser.open("adapters")
    browser.click("colours")
    browser.fill("Steps", "4")
    browser.click("Train")
    browser.sees(TOLD)
    (run,) = runs.recent(1)
    assert run.parameters == {"targets": ["adapter@colours"]}
    params = yaml.safe_load((opened.root / "params.yaml").read_text())
    assert params["adapters"]["colours"] == {"steps": 4}
    until(lambda: f"run={run.id}" in browser.driver.current_url, within=10)
    browser.driver.refresh()
    browser.sees(TOLD)
    with browsing() as other:
        other.driver.get(browser.driver.current_url)
        other.sees(TOLD)
        other.click("Cancel")
        other.sees("Cancelled")
    browser.sees("Cancelled")
    browser.click("Resume")
    until(lambda: runs.recent(1)[0].id != run.id, within=10)
    (second,) = runs.recent(1)
    until(lambda: second.id in browser.driver.current_url, within=10)
    runs.end(second.id, "Failed", "adapter colours: no space left")
    browser.sees("adapter colours: no space left")


def test_test_items_stand_beside_the_base_models_answers(opened: Opened) -> None:
    browser = opened.browser
    browser.open("adapters")
    browser.tab("Test items")
    browser.choose("Task", "colours")
    browser.sees("which colour")

    def items() -> list[str]:
        cells = "document.querySelectorAll(\"[aria-label='Test items'] td\")"
        told = browser.driver.execute_script(f"return [...{cells}].map(cell => cell.textContent)")
        return list(told[5::6])

    assert items()
    browser.click("right")
    until(lambda: "wrong" not in items(), within=20)


def test_an_adapter_from_elsewhere_is_imported(opened: Opened, tmp_path: Path) -> None:
    browser, root = opened.browser, opened.root
    folder = tmp_path / "elsewhere"
    shutil.copytree(root / "data/adapters/opposites", folder)
    data = tmp_path / "contraries.json"
    write_raw(data, opposites(70))
    browser.open("adapters")
    browser.tab("Import")
    browser.upload(
        "adapter_config.json", folder / "adapter_config.json", folder / "adapter_model.safetensors"
    )
    browser.upload("Questions and answers", data)
    browser.fill("Name of the task", "contraries")
    browser.click("Import")
    browser.sees("added contraries")
    imported = root / "data/imported/contraries/adapter_model.safetensors"
    assert imported.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    assert read_adapter_training(folder).task == "opposites"


def test_a_router_is_trained_and_its_quality_is_shown(opened: Opened) -> None:
    browser = opened.browser
    browser.open("routers")
    browser.sees("mini-MLP")
    browser.fill("epochs", "3")
    browser.click("Train")
    browser.sees("The run has started")
    (run,) = opened.runs.recent(1)
    assert run.parameters == {"targets": ["router@mlp"]}
    params = yaml.safe_load((opened.root / "params.yaml").read_text())
    assert params["routers"]["mlp"]["epochs"] == 3
    browser.tab("Quality")
    browser.sees("expected calibration error")
    browser.sees("Task (rows) and first adapter (columns)")


def test_without_a_model_the_pages_say_what_to_run(opened: Opened) -> None:
    browser = opened.browser
    browser.open("ask")
    browser.sees("no model is trained yet; run `make repro`")
    browser.fill("Question", "colour of w1")
    browser.click("Send")
    browser.sees("no model is trained yet; run `make repro`")
    browser.open("routers")
    browser.tab("Try a text")
    browser.fill("Text", "colour of w1")
    browser.click("Route")
    browser.sees("no model is trained yet; run `make repro`")
    browser.open("models")
    browser.sees("No model is registered yet")
    browser.click("Roll back")
    browser.sees("no version was in production before this one")
    browser.open("runs?run=7")
    browser.sees("there is no run '7'")


def test_runs_are_listed_with_their_results(opened: Opened) -> None:
    browser, runs = opened.browser, opened.runs
    first = runs.start("pipeline/this-tree", {"targets": ["report"]})
    runs.end(first, "Failed", "report: <i>no scores</i>")
    browser.open("runs")
    browser.sees("report: <i>no scores</i>")
    browser.click(runs.read(first).name)
    browser.sees("Prefect's page")
    assert first in browser.driver.current_url
