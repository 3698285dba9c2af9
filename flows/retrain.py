"""A retrain under Prefect: its pipeline shows stage by stage, the gate's verdict as an artifact.

python -m flows.retrain
"""

import sys
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from dlplora.edge import as_mistake
from dlplora.errors import DlpLoraError
from dlplora.lifecycle import retrain as lifecycle
from flows.pipeline import exit_on_signals, worktree
from flows.settings import ROOT

_ADVICE = "`git merge production` brings its data into your branch."


@flow(log_prints=True)
def retrain() -> State[None]:
    """Take the inbox in, train what changed, judge it, and promote it unless it is worse.

    It works in a worktree on the branch `runs/retrain`: your checkout stays as it is.
    """
    try:
        outcome = lifecycle.retrain(ROOT, _run_pipeline)
    except Exception as error:
        mistake = as_mistake(error)
        if mistake is None:
            raise
        return Failed(message=str(mistake))
    if outcome.version is None:
        return Completed(message=outcome.message)
    _show(outcome)
    version = outcome.version
    if outcome.decision == "awaiting approval":
        told = f"{version.name} awaits approval: `dlplora promote {version.name}`"
        return Completed(name="AwaitingApproval", message=f"{told}. {outcome.message} {_ADVICE}")
    told = f"{version.name} {outcome.decision}. {outcome.message}"
    if outcome.decision == "refused":
        return Completed(name="Refused", message=told)
    return Completed(message=f"{told} {_ADVICE}")


def _run_pipeline(folder: Path) -> None:
    state: State[Any] = worktree.with_options(flow_run_name="candidate")(
        folder, name="retrain", return_state=True
    )
    if not state.is_completed():
        raise DlpLoraError(f"the pipeline failed: {state.message}")


def _show(outcome: lifecycle.Outcome) -> None:
    """Show the verdict, in words and task by task."""
    version = outcome.version
    assert version is not None
    head = f"# {version.name}: {outcome.decision}\n\n"
    create_markdown_artifact(head + outcome.message, key="verdict")
    if version.card.verdict is not None:
        rows = {"all tasks": version.card.verdict.overall, **version.card.verdict.tasks}
        create_table_artifact(
            [
                {
                    "task": task,
                    "verdict": row.verdict,
                    "items": row.n,
                    "candidate": round(row.candidate, 3),
                    version.card.verdict.against: round(row.promoted, 3),
                    "difference": f"{row.difference:+.3f}",
                    "95 % interval": f"{row.low:+.3f} to {row.high:+.3f}",
                }
                for task, row in rows.items()
            ],
            key="gate",
            description="Candidate beside the model in production, on the same test items.",
        )


def main() -> int:
    """Run the flow; the exit code tells whether it went well, whatever the gate said."""
    exit_on_signals()
    state = retrain(return_state=True)
    print(state.message)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
