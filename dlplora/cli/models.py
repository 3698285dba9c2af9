"""Commands for what serves: the inbox, the gate, versions, and the storage of all that."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from dlplora.lifecycle.registry import Version

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
VersionArgument = Annotated[str, typer.Argument(help="A version, such as v0.0.3.")]
models = typer.Typer(rich_markup_mode=None, invoke_without_command=True)


def inbox(as_json: JsonOption = False) -> None:
    """Show what a retrain would take from data/inbox, and what it would refuse.

    A file is named by its task, such as data/inbox/capitals.json; a new name is a new task.
    Example: dlplora inbox
    """
    from dlplora.lifecycle.inbox import check, files_in, warn_of_links
    from dlplora.project.files import Project

    project = Project(Path())
    warn_of_links(project.root)
    arrivals = [check(project, file) for file in files_in(Path())]
    if as_json:
        typer.echo(json.dumps([asdict(arrival) for arrival in arrivals], ensure_ascii=False))
        return
    for each in arrivals:
        if each.problem is not None:
            typer.echo(f"{each.file}: would be refused: {each.problem}")
        else:
            told = f"{each.num_rows} rows, {each.num_new} new questions"
            kind = "a new task" if each.is_new_task else f"for task {each.task}"
            typer.echo(f"{each.file}: {kind}: {told}")
    if not arrivals:
        typer.echo("data/inbox is empty")
    elif any(each.problem is None for each in arrivals):
        typer.echo("`make retrain` takes the good ones in")


def judge(
    against: Annotated[
        Path | None, typer.Option(help="A model's folder.", show_default=".models/current")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the verdict to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare data/ with the model in production on the test items of both, as a retrain does.

    Example: dlplora judge
    """
    from dlplora.errors import DlpLoraError
    from dlplora.lifecycle.judging import judge as run
    from dlplora.lifecycle.registry import Registry
    from dlplora.params.load import load_params
    from dlplora.records.files import write_json
    from dlplora.stage import progress

    registry = Registry(Path())
    promoted = against or registry.current()
    if promoted is None:
        raise DlpLoraError("no model is in production yet; `make retrain` registers one")
    found = run(
        Path("data"),
        promoted,
        load_params(),
        earlier=[each.card.verdict for each in registry.versions() if each.card.verdict],
        progress=lambda name, total: progress(f"judge {name}", total=total),
    )
    if out is not None:
        write_json(out, asdict(found))
    typer.echo(json.dumps(asdict(found), ensure_ascii=False) if as_json else str(found))


@models.callback()
def list_models(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the versions, which of them is in production, and which were.

    Example: dlplora models
    """
    from dlplora.cli import display_models
    from dlplora.lifecycle.registry import Registry

    if context.invoked_subcommand is not None:
        return
    registry = Registry(Path())
    versions, history = registry.versions(), registry.history()
    promoted = history[-1].version if history else None
    rows = [_row(version, promoted) for version in versions]
    if as_json:
        typer.echo(json.dumps(rows, ensure_ascii=False))
    elif rows:
        display_models.versions(versions, history)
        display_models.history(history)
    else:
        typer.echo("no model is registered yet; `make retrain` registers one")


def _row(version: "Version", promoted: str | None) -> dict[str, Any]:
    card = version.card
    return {
        "version": version.name,
        "commit": version.commit,
        "created": card.created,
        "suite": card.suite,
        "system": card.card.system,
        "score": card.score,
        "production": version.name == promoted,
        "verdict": card.verdict.overall.verdict if card.verdict else None,
        "decision": card.decision,
    }


@models.command()
def show(version: VersionArgument, as_json: JsonOption = False) -> None:
    """Show one version: scores, data, the gate's verdict.

    Example: dlplora models show v0.0.2
    """
    from dlplora.cli import display_models
    from dlplora.lifecycle.registry import Registry

    registry = Registry(Path())
    found = registry.named(version)
    if as_json:
        row = _row(found, registry.promoted()) | {"card": asdict(found.card)}
        typer.echo(json.dumps(row, ensure_ascii=False))
    else:
        display_models.version(found, registry.history())


def promote(version: VersionArgument) -> None:
    """Put a version into production: one that awaits approval, or any other.

    Example: dlplora promote v0.0.3
    """
    from dlplora.lifecycle.registry import Registry

    registry = Registry(Path())
    found = registry.promote(version)
    typer.echo(f"{found.name} is in production: .models/current")
    if advice := registry.advice():
        typer.echo(advice)


def rollback(
    version: Annotated[
        str | None,
        typer.Argument(help="One that was in production; the one before if not given."),
    ] = None,
) -> None:
    """Take the last promotion back. The data stays; the next retrain builds on it.

    Example: dlplora rollback
    """
    from dlplora.lifecycle.registry import Registry

    found = Registry(Path()).rollback(version)
    typer.echo(f"{found.name} is in production again: .models/current")


def schedule(
    state: Annotated[
        Literal["on", "off", "show"], typer.Argument(help="Retrain by the timer?")
    ] = "show",
) -> None:
    """Switch the timer of retrains on or off, in this clone; it runs while `make ui` is open.

    Its cron stands in prefect.yaml. Files put into data/inbox start a retrain either way.
    Example: dlplora schedule on
    """
    from dlplora.lifecycle.schedule import is_on, switch

    if state != "show":
        switch(Path(), on=state == "on")
    on = "on: retrains start by the cron of prefect.yaml, while `make ui` is open"
    now = on if is_on(Path()) else "off"
    typer.echo(f"the schedule is {now}")


def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Free the cache of what no version, branch, worktree or the workspace needs.

    Example: dlplora gc
    """
    from dlplora.lifecycle.storage import delete_unused, unused_bytes

    count, size = unused_bytes(Path())
    typer.echo(f"{count} cached files, {size / 2**20:,.1f} MiB, are needed by nothing")
    if yes or typer.confirm(
        "delete them, and the folders .models/v… of models that are not in production?"
    ):
        delete_unused(Path())


def push() -> None:
    """Send results, the run-cache and all versions to DVC's remote, and their tags to git's.

    Example: dlplora push
    """
    from dlplora.lifecycle.storage import push as run

    _tell_remote(run(Path()), "sent to")


def pull() -> None:
    """Fetch results, the run-cache and all versions, and check out that in production.

    Example: dlplora pull
    """
    from dlplora.lifecycle.storage import pull as run

    _tell_remote(run(Path()), "fetched from")


def _tell_remote(remote: str | None, what: str) -> None:
    where = "git has no remote: tags and the branch production stay here"
    typer.echo(where if remote is None else f"tags and the branch production {what} {remote}")
