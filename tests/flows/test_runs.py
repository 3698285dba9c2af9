"""Runs as the app sees them: started, watched, cancelled and started again on a real server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from socket import create_server
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings

from dlplora.app.runs import Run, RunError
from flows import runs as module
from flows.pipeline import worktree
from flows.runs import PrefectRuns
from tests.flows.dummies import make_tree, seldom
from tests.waiting import until

PROGRESS = "base_model base: 1/4, 3 s left loss 0.5"
FORM = {"targets": ["adapter"], "force": True}


@flow
def around(root: Path) -> State[None]:
    """Bring a tree up to date in a run within this one, as experiments and retrains do."""
    get_run_logger().info("begin")
    return worktree(root, return_state=True)


@pytest.fixture
def runs() -> PrefectRuns:
    return PrefectRuns(str(get_current_settings().api.url))


@pytest.fixture
def deployment() -> Iterator[UUID]:
    """The deployment `around/here`; no worker takes its runs."""
    with get_client(sync_client=True) as client:
        made = client.create_deployment(
            client.create_flow(around), "here", parameters={"root": "."}
        )
        yield made
        client.delete_deployment(made)


def deployments(runs: PrefectRuns) -> set[str]:
    return {run.deployment for run in runs.recent(50)}


def newest(runs: PrefectRuns, deployment: str) -> Run:
    return next(run for run in runs.recent(20) if run.deployment == deployment)


def test_a_run_is_watched_stage_by_stage_with_the_runs_within_it(
    runs: PrefectRuns, tmp_path: Path
) -> None:
    tree = make_tree(tmp_path / "project")
    tree.write("base", "wait")
    tree.write("opposites", "bad")

    def percents(run_id: str) -> dict[str, float | None]:
        return {stage.name: stage.percent for stage in runs.stages(run_id)}

    with ThreadPoolExecutor() as pool:
        outcome = pool.submit(around, tree.root, return_state=True)
        try:
            until(seldom(lambda: "around" in deployments(runs)), within=30)
            run = newest(runs, "around")
            until(seldom(lambda: percents(run.id).get("base_model") == 25.0), within=60)
            assert not runs.read(run.id).is_over
            stages = runs.stages(run.id)
        finally:
            (tree.root / ".scratch/go").touch()
        outcome.result()
    first, *others = stages
    assert (first.name, first.state, first.told) == ("base_model", "Running", PROGRESS)
    assert {stage.name for stage in others} <= {
        "adapter@opposites",
        "adapter@colours",
        "compare",
        "report",
    }
    assert {(stage.state, stage.seconds, stage.percent) for stage in others} <= {
        ("Pending", None, None)
    }

    until(seldom(lambda: runs.read(run.id).is_over), within=30)
    end = "Finished in state Failed('1/1 states failed.')"
    until(seldom(lambda: runs.lines(run.id, last=1) == [end]), within=30)
    after = runs.stages(run.id)
    assert {stage.name: stage.state for stage in after} == {
        "base_model": "Completed",
        "adapter@opposites": "Failed",
        "adapter@colours": "Completed",
        "compare": "NotReady",
        "report": "NotReady",
    }
    failed = next(stage for stage in after if stage.state == "Failed")
    assert failed.message.endswith("suites/opposites.txt: bad words")
    assert after[0].name == "base_model"
    assert after[0].seconds is not None
    assert after[0].seconds > 0
    assert (after[-1].seconds, after[-1].percent, after[-1].told) == (None, None, "")
    ended = runs.read(run.id)
    assert (ended.name, ended.state, ended.seconds is not None) == (run.name, "Failed", True)
    lines = runs.lines(run.id, last=500)
    assert lines.index("begin") < lines.index(PROGRESS)
    assert runs.lines(run.id, last=3) == lines[-3:]
    assert "worktree" not in deployments(runs)
    with pytest.raises(RunError, match="on a command line"):
        runs.start_again(run.id)
    with pytest.raises(RunError, match="has ended already: Failed"):
        runs.cancel(run.id)


def test_a_log_of_many_pages_is_read_from_its_end(
    runs: PrefectRuns, deployment: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAGE", 4)
    run = runs.start("around/here", {})
    began = datetime.now(UTC)
    rows: list[dict[str, Any]] = [
        {
            "name": "test",
            "level": 20,
            "message": f"line {2 * number}\nline {2 * number + 1}",
            "timestamp": (began + timedelta(milliseconds=number)).isoformat(),
            "flow_run_id": run,
        }
        for number in range(10)
    ]
    with get_client(sync_client=True) as client:
        client.create_logs(rows)
    until(lambda: len(runs.lines(run, last=50)) == 20, within=30)
    assert runs.lines(run, last=13) == [f"line {number}" for number in range(7, 20)]
    assert runs.lines(run, last=0) == []


def test_a_run_that_waits_is_cancelled_at_once_and_started_again(
    runs: PrefectRuns, deployment: UUID
) -> None:
    first = runs.start("around/here", FORM)
    waiting = runs.read(first)
    assert (waiting.deployment, waiting.state) == ("around/here", "Scheduled")
    assert waiting.parameters == {"root": ".", **FORM}
    assert (waiting.is_over, waiting.began, waiting.seconds) == (False, None, None)
    assert (runs.stages(first), runs.lines(first, last=9)) == ([], [])
    runs.cancel(first)
    cancelled = runs.read(first)
    assert (cancelled.state, cancelled.is_over) == ("Cancelled", True)
    with pytest.raises(RunError, match="has ended already: Cancelled"):
        runs.cancel(first)
    second = runs.start_again(first)
    assert second != first
    assert runs.read(second).parameters == waiting.parameters
    assert [run.id for run in runs.recent(2)] == [second, first]
    assert [run.id for run in runs.recent(1)] == [second]
    assert runs.page(first) == f"{str(get_current_settings().api.url)[:-4]}/runs/flow-run/{first}"


def test_what_a_schedule_plans_is_no_run_yet(runs: PrefectRuns, deployment: UUID) -> None:
    started = runs.start("around/here", {})
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        client.create_deployment_schedules(
            deployment, [({"interval": 10, "anchor_date": now.isoformat()}, True)]
        )
        client.request(
            "POST",
            "/deployments/{id}/schedule",
            path_params={"id": deployment},
            json={
                "start_time": (now - timedelta(seconds=30)).isoformat(),
                "end_time": (now + timedelta(seconds=90)).isoformat(),
            },
        )
        planned = [run for run in client.read_flow_runs() if run.auto_scheduled]
    assert len(planned) > 5
    assert newest(runs, "around/here").id == started
    assert not {str(run.id) for run in planned} & {run.id for run in runs.recent(50)}


def test_what_is_unknown_is_one_line(runs: PrefectRuns, deployment: UUID) -> None:
    asked = (runs.read, runs.stages, runs.cancel, runs.start_again, runs.page)
    for ask in asked:
        with pytest.raises(RunError, match="no run 'first'"):
            ask("first")
    for ask in asked[:-1]:
        with pytest.raises(RunError, match="no run 00000000-"):
            ask(str(UUID(int=0)))
    with pytest.raises(RunError, match="no run"):
        runs.lines(str(uuid4()), last=1)
    with pytest.raises(RunError, match=r"no deployment around/there; there are: .*around/here"):
        runs.start("around/there", {})


def test_a_server_that_is_not_there_or_says_nothing_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_SECONDS", 0.5)
    with closing(create_server(("127.0.0.1", 0))) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RunError, match=f"{address} does not answer: ReadTimeout"):
            PrefectRuns(f"{address}/api").recent(1)
    with pytest.raises(RunError, match=f"{address} does not answer: ConnectError"):
        PrefectRuns(f"{address}/api").start("pipeline/this-tree", {})


def test_threads_share_one(runs: PrefectRuns, deployment: UUID) -> None:
    started = {runs.start("around/here", {}) for _ in range(4)}
    with ThreadPoolExecutor(4) as pool:
        assert {run.id for run in pool.map(runs.read, started)} == started
