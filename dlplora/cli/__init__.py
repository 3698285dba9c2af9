"""The command line. Exit code 1 is a user's mistake, told in one line, 2 is wrong usage."""

from collections.abc import Callable
from typing import Annotated

import typer

from dlplora.cli import ask, models, project, prompts, serve
from dlplora.edge import one_line_errors, refuse_other_code, set_up_process, show_messages

app = typer.Typer(
    help="One LoRA adapter per task, and routers that choose. Run it in the project's folder; "
    "then `make repro` computes what changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    ask.generate,
    ask.route,
    ask.score,
    serve.serve,
    prompts.prompts,
    project.validate,
    project.add_task,
    project.set_,
    project.remove_task,
    project.prune,
    project.use_suite,
    project.repro_suite,
    project.find_clusters,
    project.pin,
    project.check_runtime,
    models.inbox,
    models.judge,
    models.promote,
    models.rollback,
    models.schedule,
    models.gc,
    models.push,
    models.pull,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("dlplora"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and leave."
        ),
    ] = False,
) -> None: ...


for command in _COMMANDS:
    app.command(command.__name__.strip("_").replace("_", "-"))(command)
app.add_typer(models.models, name="models")
app.command(context_settings={"ignore_unknown_options": True})(project.repro)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr."""
    set_up_process()
    show_messages()
    with one_line_errors():
        refuse_other_code()
        app()
