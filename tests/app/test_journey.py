"""One person's way through all pages, with everything real but the size of the model."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.app.browser import Browser
from tests.flows.dummies import free_ports, marked
from tests.project import ROOT, Checkout, reds
from tests.tiny import write_raw
from tests.waiting import until

MARK = "DLPLORA_APP"
LONG = 300.0


@contextmanager
def whole_app(root: Path) -> Iterator[tuple[str, int]]:
    """Run `make app` for the time of a `with` block; yields its address and process."""
    port, ui, server = (free_ports() for _ in range(3))
    options = ["--port", str(port), "--ui-port", str(ui), "--server-port", str(server)]
    log = root.parent / "app.log"
    environment = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
    with log.open("wb") as file:
        app = subprocess.Popen(
            [sys.executable, "-m", "flows.app", *options],
            cwd=root,
            env=environment,
            stdout=file,
            stderr=file,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: address in log.read_text() or app.poll() is not None)
        assert app.poll() is None, log.read_text()
        yield address, app.pid
    finally:
        app.send_signal(signal.SIGTERM)
        code = app.wait(90)
    assert code == 0, log.read_text()
    assert marked(MARK, app.pid) == []


@pytest.fixture
def project(learned_project: Checkout) -> Checkout:
    """A project with one version in production, where a person has the last word."""
    root = learned_project.root
    (root / "prefect.yaml").write_bytes((ROOT / "prefect.yaml").read_bytes())
    params = (root / "params.yaml").read_text()
    (root / "suites/toy.yaml").write_text(params[params.index("sources:") :])  # a form names it
    learned_project.edit(lambda values: values["gate"].update(approval=True))
    learned_project.commit("Ask a person")
    return learned_project


def ask(browser: Browser, model: str, question: str) -> None:
    """Ask a question on the page Ask, by a model that is named."""
    browser.choose("Model", model)
    browser.fill("Question", question)
    browser.click("Send")


def test_from_a_file_to_a_promoted_model_and_back(
    window: Browser, project: Checkout, tmp_path: Path
) -> None:
    file = tmp_path / "shapes.json"
    write_raw(file, reds("shapes", count=60))
    with whole_app(project.root) as (address, pid):
        browser = window
        browser.turn_to(address)
        browser.open("ask")
        browser.sees("v0.0.1: 2 adapters", within=LONG)
        ask(browser, "colours", "colour of w1")
        assert (browser.answer(), browser.legend()) == ("red", ["colours"])
        browser.open("data")
        browser.upload("File of questions and answers", file)
        browser.click("Check")
        browser.sees("shapes.json is good")
        browser.click("Add task")
        browser.sees("added shapes")
        browser.open("adapters")
        browser.click("shapes")
        browser.click("Train")
        browser.sees("The run has started")
        until(lambda: "run=" in browser.driver.current_url, within=20)
        browser.driver.refresh()  # in the middle of the training
        browser.sees("adapter@shapes", within=LONG)
        browser.ends("Completed", within=LONG)
        browser.open("routers")
        browser.fill("epochs", "5")
        browser.click("Train")
        browser.ends("Completed", within=LONG)
        browser.tab("Quality")
        browser.sees("shapes")
        browser.tab("Try a text")
        browser.fill("Text", "say w3")
        browser.click("Route")
        browser.sees("the base model answers")
        browser.open("models")
        browser.sees("Not committed")
        browser.click("Commit")
        browser.sees("the next retrain takes it in")
        browser.click("Retrain")
        browser.ends("AwaitingApproval", within=LONG)
        browser.sees("awaits approval")
        browser.choose("Version", "v0.0.2")
        browser.click("Promote")
        browser.sees("v0.0.2 is in production")
        browser.open("ask")
        browser.sees("v0.0.2: 3 adapters", within=LONG)
        ask(browser, "shapes", "say w3")
        assert (browser.answer(), browser.legend()) == ("red", ["shapes"])
        browser.open("runs")
        browser.sees("retrain/scheduled")
        browser.open("models")
        browser.click("Roll back")
        browser.sees("v0.0.1 is in production again")
        browser.open("ask")
        browser.sees("v0.0.1: 2 adapters", within=LONG)
        end_server(pid)
        until(lambda: "v0.0.1: 2 adapters" not in browser.text, within=LONG)
        browser.sees("v0.0.1: 2 adapters", within=LONG)


def end_server(app: int) -> None:
    """Kill the model's server, and wait until another one was started instead."""

    def servers() -> set[int]:
        return {one.pid for one in marked(MARK, app) if "serve" in one.cmdline()}

    before = servers()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    until(lambda: bool(servers() - before), within=LONG)
