"""The pipeline with other parameters than those committed, in a git worktree for each seed."""

import hashlib
import json
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from dlplora.errors import DlpLoraError, ParamsError, choices
from dlplora.params.load import load_params
from dlplora.params.yaml import read_yaml
from dlplora.project.files import Project, dump
from dlplora.project.own_tasks import unlist
from dlplora.project.suites import suite_names, use_suite
from dlplora.project.worktrees import (
    commit_all,
    commit_of,
    delete_old,
    open_worktree,
    uncommitted,
)
from flows.pipeline import worktree
from flows.settings import ROOT
from flows.shown import read_scores, report_link

_SUITES = suite_names(Project(ROOT))


def _known_tasks() -> list[str]:
    files = [ROOT / "params.yaml", *(ROOT / "suites" / f"{suite}.yaml" for suite in _SUITES)]
    sections = [read_yaml(file)["tasks"] for file in files]
    return sorted({task for section in sections for task in section})


def _plain_fields(schema: dict[str, Any]) -> None:
    """Show values that may be left empty as plain fields of a form; null is no number."""
    for field in schema["properties"].values():
        field.pop("default")
        field.update(field.pop("anyOf")[0])


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_plain_fields)

    def given(self) -> dict[str, Any]:
        """Return the values that were filled in."""
        return self.model_dump(exclude_none=True)


Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


class Lora(_Form):
    """How adapters are trained; what is left empty is as in the suite."""

    rank: Count | None = None
    alpha: Count | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    learning_rate: Rate | None = None
    steps: Count | None = None


class Router(_Form):
    """The mini-MLP router and the p of top-p; what is left empty is as in the suite."""

    hidden: Count | None = None
    learning_rate: Rate | None = None
    epochs: Count | None = None
    p: Annotated[float, Field(gt=0, le=1)] | None = None


Suite = Annotated[str, Field(json_schema_extra={"enum": _SUITES})]
Tasks = list[Annotated[str, Field(json_schema_extra={"enum": _known_tasks()})]]
Seeds = Annotated[list[int], Field(min_length=1)]


@flow(flow_run_name="{suite}", log_prints=True)
def experiment(
    suite: Suite = "default",
    tasks: Tasks = [],  # noqa: B006
    lora: Lora = Lora(),  # noqa: B008
    router: Router = Router(),  # noqa: B008
    seeds: Seeds = [0],  # noqa: B006
) -> State[None]:
    """Run a suite with other parameters, each seed on a branch `runs/…` of its own.

    It begins with what is committed; adapters, routers and scores that are not affected come from
    the cache that all runs share.

    Args:
        suite: Tasks, systems and sizes to begin with.
        tasks: Those of the suite, or of your own, to use; none: all.
        lora: How adapters are trained; what is left empty is as in the suite.
        router: The mini-MLP router and the p of top-p; what is left empty is as in the suite.
        seeds: One run for each, one after another.
    """
    log = get_run_logger()
    try:
        for changed in uncommitted(ROOT):
            log.warning("%s: its uncommitted changes are not part of this run", changed)
        states: dict[str, State[Any]] = {}
        folders: dict[str, Path] = {}
        for seed in dict.fromkeys(seeds):
            name = _name(suite, tasks, lora, router, seed)
            folder = folders[name] = open_worktree(ROOT, name)
            _edit(Project(folder), suite=suite, tasks=tasks, lora=lora, router=router, seed=seed)
            commit_all(folder, f"Set the parameters of run {name}")
            run = worktree.with_options(flow_run_name=name)
            states[name] = run(folder, name=name, return_state=True)
            commit_all(folder, f"Keep the results of run {name}")
        _show(states, folders)
        keep = load_params(ROOT / "params.yaml").flow.keep_runs
        for old in delete_old(ROOT, keep=keep):
            log.info("worktree of %s deleted; branch runs/%s keeps its results", old, old)
    except DlpLoraError as error:
        return Failed(message=str(error))
    failed = [name for name, state in states.items() if not state.is_completed()]
    if failed:
        return Failed(message=f"failed: {', '.join(failed)}")
    return Completed(message=f"branches {', '.join(f'runs/{name}' for name in states)}")


def _name(suite: str, tasks: list[str], lora: Lora, router: Router, seed: int) -> str:
    """Name a run by what it depends on: the same one again goes on where it was."""
    told = [commit_of(ROOT), suite, sorted(tasks), lora.given(), router.given(), seed]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return f"{suite}-{digest[:8]}-seed{seed}"


def _edit(
    project: Project, *, suite: str, tasks: list[str], lora: Lora, router: Router, seed: int
) -> None:
    """Write the form's values into params.yaml."""
    use_suite(project, suite, force=True)
    params = project.read()
    if unknown := set(tasks) - set(params["tasks"]):
        raise ParamsError(
            f"suite {suite}: no task {choices(unknown)}; there are: {choices(params['tasks'])}"
        )
    for task in list(params["tasks"]):
        if tasks and task not in tasks:
            unlist(params, task)
    params["seed"] = seed
    for section in (params["adapter"], *params["adapters"].values()):
        section.update({key: value for key, value in lora.given().items() if key in section})
    shape = {key: value for key, value in router.given().items() if key != "p"}
    for entry in params["routers"].values():
        if entry["kind"] == "mlp":
            entry.update(shape)
    for system in params["systems"].values():
        if system["kind"] == "top_p" and router.p is not None:
            system["p"] = router.p
    project.write(dump(params))


def _show(states: dict[str, State[Any]], folders: dict[str, Path]) -> None:
    """Link the reports of all runs, and put their scores side by side."""
    lines = [
        f"- [{name}]({report_link(name)}), branch `runs/{name}`: {state.message}"
        if state.is_completed()
        else f"- {name}: {state.message}"
        for name, state in states.items()
    ]
    create_markdown_artifact("\n".join(lines), key="runs")
    scores = {
        name: read_scores(folders[name]) for name, state in states.items() if state.is_completed()
    }
    if len(scores) > 1:
        first = next(iter(scores.values()))
        create_table_artifact(
            [
                {"system": system, "mean": round(mean(row), 3)}
                | {name.rpartition("-")[2]: value for name, value in zip(scores, row, strict=True)}
                for system in first
                for row in [[each[system] for each in scores.values()]]
            ],
            key="seeds",
            description="Scores on the held-out items, by seed.",
        )
