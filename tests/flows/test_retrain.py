"""The flow of retrains: what its state, message and artifacts tell, and what starts it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId

from dlplora.errors import DlpLoraError
from dlplora.lifecycle.registry import Version
from dlplora.lifecycle.retrain import Outcome
from dlplora.records.model_card import ModelCard, TaskData, VersionCard
from dlplora.records.verdict import Decision, Difference, Judgement, Verdict
from flows import retrain as flow
from tests.flows.dummies import ROOT, Ended, ended, make_tree

_DATA = {task: TaskData(40, 8, 60, "a" * 64) for task in ("colours", "opposites")}


def outcome(decision: Decision, verdict: Verdict | None) -> Outcome:
    """Make the outcome of a retrain that registered v0.0.7."""
    judgement = None
    if verdict is not None:
        task = Difference(verdict, 24, 0.5, 0.625, -0.125, -0.25, 0.0)
        whole = Difference(verdict, 48, 0.25, 0.5, -0.25, -0.375, -0.1)
        tasks = {"colours": task}
        judgement = Judgement(
            "v0.0.6", "mlp", "mlp", whole, tasks, {"colours": "b" * 64}, 0, 1.0, ()
        )
    card = VersionCard(
        created="2031-05-06T07:08:09+00:00",
        suite="default",
        score=0.25,
        scores={"iid": {"mlp": 0.25}},
        card=ModelCard("f" * 64, "mlp", _DATA),
        inputs="1" * 64,
        base_md5="2" * 32,
        model_md5="3" * 32,
        verdict=judgement,
        decision=decision,
    )
    return Outcome(Version("v0.0.7", "c" * 40, card), "What the verdict says.", decision)


def retrained(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Callable[[Path], None]], Outcome]
) -> Ended:
    """Run the flow on a retrain that acts so with its pipeline; return what became of it."""

    def retrain(root: Path, run_pipeline: Callable[[Path], None]) -> Outcome:
        assert root == ROOT
        return act(run_pipeline)

    monkeypatch.setattr(flow.lifecycle, "retrain", retrain)
    return ended(flow.retrain(return_state=True))


@pytest.mark.parametrize(
    ("decision", "verdict", "name", "said"),
    [
        (
            "promoted",
            "better",
            "Completed",
            "v0.0.7 promoted. What the verdict says. `git merge production` brings its data "
            "into your branch.",
        ),
        (
            "not promoted",
            "cannot judge",
            "Completed",
            "v0.0.7 not promoted. What the verdict says. `git merge production` brings its data "
            "into your branch.",
        ),
        (
            "awaiting approval",
            "within noise",
            "AwaitingApproval",
            "v0.0.7 awaits approval: `dlplora promote v0.0.7`. What the verdict says. `git merge "
            "production` brings its data into your branch.",
        ),
        ("refused", "significantly worse", "Refused", "v0.0.7 refused. What the verdict says."),
    ],
)
def test_the_state_tells_what_became_of_the_candidate_and_artifacts_why(
    monkeypatch: pytest.MonkeyPatch, decision: Decision, verdict: Verdict, name: str, said: str
) -> None:
    became = retrained(monkeypatch, lambda _: outcome(decision, verdict))
    assert became.state.is_completed()
    assert (became.state.name, became.state.message) == (name, said)
    assert became.artifacts["verdict"] == f"# v0.0.7: {decision}\n\nWhat the verdict says."
    assert json.loads(became.artifacts["gate"]) == [
        {
            "task": "all tasks",
            "verdict": verdict,
            "items": 48,
            "candidate": 0.25,
            "v0.0.6": 0.5,
            "difference": "-0.250",
            "95 % interval": "-0.375 to -0.100",
        },
        {
            "task": "colours",
            "verdict": verdict,
            "items": 24,
            "candidate": 0.5,
            "v0.0.6": 0.625,
            "difference": "-0.125",
            "95 % interval": "-0.250 to +0.000",
        },
    ]


def test_the_first_version_is_shown_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    became = retrained(monkeypatch, lambda _: outcome("promoted", None))
    assert became.state.is_completed()
    assert set(became.artifacts) == {"verdict"}


def test_nothing_new_is_completed_and_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    became = retrained(monkeypatch, lambda _: Outcome(None, "nothing new since v0.0.6"))
    assert became.state.is_completed()
    assert became.state.message == "nothing new since v0.0.6"
    assert became.artifacts == {}


def test_a_mistake_and_a_full_disk_are_failed_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(_: object) -> Outcome:
        raise DlpLoraError("no commit yet")

    became = retrained(monkeypatch, mistaken)
    assert became.state.is_failed()
    assert became.state.message == "no commit yet"

    def full(_: object) -> Outcome:
        raise OSError(28, "No space left on device", "data/raw/colours/colours.json")

    became = retrained(monkeypatch, full)
    assert became.state.is_failed()
    assert "no space left on the disk" in str(became.state.message)
    assert "\n" not in str(became.state.message)


def test_the_pipeline_shows_as_the_run_candidate_and_its_failure_is_the_flows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = make_tree(tmp_path / "project")

    def act(run_pipeline: Callable[[Path], None]) -> Outcome:
        run_pipeline(tree.root)
        return outcome("promoted", "better")

    became = retrained(monkeypatch, act)
    assert became.state.is_completed(), became.state.message
    assert (tree.root / "data/comparison.json").is_file()
    (run,) = below(became)
    assert run == ("candidate", "Completed")

    tree.write("colours", "bad")
    became = retrained(monkeypatch, act)
    assert became.state.is_failed()
    assert str(became.state.message).startswith("the pipeline failed: ")
    assert "1 Failed" in str(became.state.message)
    assert below(became) == [("candidate", "Failed")]
    assert became.artifacts == {}


def below(became: Ended) -> list[tuple[str, str | None]]:
    """List the flow runs that a flow run started, each with its state's name."""
    parent = became.state.state_details.flow_run_id
    assert parent is not None
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent])
            )
        )
    return [(run.name, run.state_name) for run in runs]


def test_its_deployment_is_started_by_files_and_on_time_only_once_switched_on() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (scheduled,) = (each for each in deployments if each["name"] == "scheduled")
    assert scheduled["entrypoint"] == "flows/retrain.py:retrain"
    assert scheduled["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    (schedule,) = scheduled["schedules"]
    assert schedule["active"] is False
    assert len(schedule["cron"].split()) == 5
    (trigger,) = scheduled["triggers"]
    assert trigger["enabled"] is True
    assert trigger["expect"] == ["dlplora.inbox.changed"]
    assert trigger["match"] == {"prefect.resource.id": "dlplora.inbox"}
