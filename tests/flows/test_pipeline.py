"""The flow and `dvc repro` on one tree: same cache, same truth, and what the flow shows of it."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

from dlplora.scratch import is_held
from tests.flows.dummies import Tree, make_tree
from tests.waiting import until

ALL = {"base_model", "adapter@opposites", "adapter@colours", "compare", "report"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree that the flow brought up to date. It is only copied."""
    tree = make_tree(tmp_path_factory.mktemp("done") / "project")
    assert tree.flow().told("ran") == ALL
    return tree


@pytest.fixture
def tree(done: Tree, tmp_path: Path) -> Tree:
    """A copy of that tree."""
    shutil.copytree(done.root, tmp_path / "project")
    return Tree(tmp_path / "project")


def ran(output: str) -> set[str]:
    return set(re.findall(r"Running stage '(.+)'", output))


def test_after_a_repro_all_is_cached(tree: Tree) -> None:
    assert ran(tree.run("dvc", "repro", "--force")) == ALL
    ended = tree.flow()
    assert ended.told("up to date") == ended.named("Cached") == ALL
    assert ended.state.is_completed()


def test_after_the_flow_on_a_fresh_clone_a_repro_has_nothing_to_do(tree: Tree) -> None:
    clone = Tree(tree.root.parent / "clone")
    tree.run("git", "clone", "-q", str(tree.root), str(clone.root))
    assert clone.flow().told("ran") == ALL
    assert clone.run("dvc", "status", "--json").strip() == "{}"
    assert "Data and pipelines are up to date" in clone.run("dvc", "repro")


def test_an_added_task_runs_its_stages_and_what_follows(tree: Tree) -> None:
    tree.write("sums", "sums\n")

    def add(values: dict[str, dict[str, object]]) -> None:
        values["adapters"]["sums"] = {}
        values["tasks"]["sums"] = values["tasks"]["colours"]

    before = (tree.root / "params.yaml").read_text()
    tree.edit(add)
    ended = tree.flow()
    assert ended.told("ran") == {"adapter@sums", "compare", "report"}
    assert ended.told("up to date") == {"base_model", "adapter@opposites", "adapter@colours"}
    (tree.root / "params.yaml").write_text(before)
    ended = tree.flow()
    assert ended.told("restored from the cache") == {"compare", "report"}
    assert not (tree.root / "data/adapters/sums.txt").exists()


def test_a_reverted_change_is_restored(tree: Tree) -> None:
    adapter = tree.root / "data/adapters/colours.txt"
    before = adapter.read_bytes()
    tree.edit(lambda values: values["adapters"]["colours"].update(steps=9))
    later = {"adapter@colours", "compare", "report"}
    assert tree.flow().told("ran") == later
    tree.edit(lambda values: values["adapters"].update(colours={}))
    ended = tree.flow()
    assert ended.told("restored from the cache") == later
    assert adapter.read_bytes() == before


def test_a_failed_stage_stops_what_follows_and_nothing_else(tree: Tree) -> None:
    tree.write("opposites", "bad")
    tree.write("colours", "new")
    ended = tree.flow()
    assert ended.state.is_failed()
    assert ended.named("Failed") == {"adapter@opposites"}
    assert ended.named("NotReady") == {"compare", "report"}
    assert ended.named("Completed") == {"adapter@colours"}
    said = ended.stages["adapter@opposites"].message
    assert said == "adapter@opposites: suites/opposites.txt: bad words"
    rows = {row["stage"]: row for row in json.loads(ended.artifacts["stages"])}
    assert rows["adapter@opposites"]["detail"] == said
    tree.write("opposites", "good")
    assert tree.flow().told("ran") == {"adapter@opposites", "compare", "report"}


def test_what_can_fail_outside_is_tried_again(tree: Tree) -> None:
    tree.write("base", "once")
    assert tree.flow("base_model").told("ran") == {"base_model"}
    tree.write("colours", "once")
    (tree.root / ".scratch/tried").unlink()  # a training is not tried again
    assert tree.flow("adapter@colours").named("Failed") == {"adapter@colours"}


def test_trainings_run_one_at_a_time_within_their_limit(tree: Tree) -> None:
    for task in ("opposites", "colours"):
        tree.write(task, "alone")
    assert tree.flow("adapter").told("ran") == {"adapter@opposites", "adapter@colours"}


def test_independent_stages_run_at_the_same_time(tree: Tree) -> None:
    for task in ("opposites", "colours"):
        tree.write(task, "meet")
    tree.edit(lambda values: values["flow"]["limits"].update(training=2))
    assert tree.flow("adapter").state.is_completed()


def test_a_target_brings_what_it_needs_and_no_more(tree: Tree) -> None:
    assert set(tree.flow("adapter@colours").stages) == {"base_model", "adapter@colours"}
    ended = tree.flow("adapter@colours", force=True)
    assert ended.told("ran") == {"base_model", "adapter@colours"}


@pytest.mark.parametrize(
    ("targets", "change", "said"),
    [
        (["nosuch"], lambda values: None, "no stage 'nosuch'; there are: adapter@colours, "),
        (
            [],
            lambda values: values["flow"]["limits"].pop("training"),
            "flow.limits has no training",
        ),
        ([], lambda values: values.pop("seed"), "params.yaml: seed: is missing"),
    ],
)
def test_a_mistake_is_one_line(tree: Tree, targets: list[str], change: object, said: str) -> None:
    tree.edit(change)
    ended = tree.flow(*targets)
    assert ended.state.is_failed()
    assert said in str(ended.state.message)
    assert "\n" not in str(ended.state.message)


def test_the_artifacts_show_stages_scores_report_and_progress(tree: Tree) -> None:
    ended = tree.flow(force=True)
    rows = json.loads(ended.artifacts["stages"])
    assert {row["stage"] for row in rows} == ALL
    assert all(row["seconds"] > 0 for row in rows)
    (scores,) = json.loads(ended.artifacts["metrics"])
    assert (scores["setting"], scores["system"]) == ("iid", "single")
    assert "![Scores](data:image/svg+xml;base64,PHN2Zy8+)" in ended.artifacts["report"]
    assert "index.html" in ended.artifacts["report-page"]
    assert ended.artifacts["adapter-colours"] == 25.0


def test_places_that_a_killed_flow_held_are_given_back(tree: Tree) -> None:
    assert tree.flow().state.is_completed()  # makes the limits
    with get_client(sync_client=True) as client:
        lost = GlobalConcurrencyLimitUpdate(active_slots=1)
        client.update_global_concurrency_limit("training", lost)
        tree.edit(lambda values: values["adapter"].update(steps=5))
        assert tree.flow().state.is_completed()
        assert client.read_global_concurrency_limit_by_name("training").active_slots == 0


def test_the_flow_makes_its_limits_itself(tree: Tree) -> None:
    tree.edit(lambda values: values["flow"]["limits"].update(training=3))
    tree.flow()
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name("training").limit == 3


def test_a_second_flow_waits_for_the_first(tree: Tree) -> None:
    tree.write("colours", "wait")
    first = tree.start("first.log")
    until(lambda: "adapter colours: 1/4" in tree.lines("first.log"))
    second = tree.start("second.log")
    until(lambda: f"repro: process {first.pid} is at it; waiting" in tree.lines("second.log"))
    (tree.root / ".scratch/go").touch()
    assert (first.wait(), second.wait()) == (0, 0), tree.lines("second.log")
    assert "2 up to date, 3 ran" in tree.lines("first.log")
    assert "5 up to date" in tree.lines("second.log")


def test_without_a_server_the_exit_code_tells_and_one_line_says_why(tree: Tree) -> None:
    tree.write("colours", "bad")
    shutil.rmtree(tree.root / ".scratch")
    assert tree.start("flow.log", "adapter", with_server=False).wait() == 1
    lines = tree.lines("flow.log")
    assert "suites/colours.txt: bad words" in lines
    assert "1 Failed" in lines


def test_a_cancelled_flow_leaves_no_process(tree: Tree) -> None:
    for task in ("opposites", "colours"):
        tree.write(task, "wait")
    running = tree.start("flow.log")
    until(lambda: ": 1/4" in tree.lines("flow.log").partition("adapter ")[2])
    below = psutil.Process(running.pid).children(recursive=True)
    stages = [process for process in below if "stage.py" in process.cmdline()]
    assert stages
    running.terminate()
    assert running.wait() not in (0, 1)
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not is_held("repro", scratch=tree.root / ".scratch")
    (tree.root / ".scratch/go").touch()
    assert tree.flow().told("ran") == ALL - {"base_model"}


def test_ctrl_c_in_a_terminal_ends_a_flow_with_its_own_server_and_leaves_no_process(
    tree: Tree,
) -> None:
    tree.write("colours", "wait")
    running = tree.start("first.log", with_server=False, own_group=True)
    stages = "adapter colours: 1/4"
    until(lambda: stages in tree.lines("first.log") or running.poll() is not None)
    below = psutil.Process(running.pid).children(recursive=True)
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(timeout=60) == 130
    _, alive = psutil.wait_procs(below, timeout=20)
    assert alive == []
    assert "ConnectError" not in tree.lines("first.log")
