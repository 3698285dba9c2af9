"""Commands for one's own data, for suites, and to bring the pipeline up to date."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dlplora.errors import DlpLoraError
from dlplora.words import Primary

if TYPE_CHECKING:
    from dlplora.params.inputs import Keys

KeysOption = Annotated[
    str | None,
    typer.Option(
        metavar="Q,A[,OPTIONS]",
        help="What the fields are called, such as frage,antwort; found if not given.",
    ),
]
ContextOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME]", help="Fields that stand in front of the question; with --keys."
    ),
]

_NEXT = "run `make repro`, or commit it and run `make retrain`"


def _keys(names: str | None, context: str | None) -> "Keys | Literal['auto']":
    from dlplora.params.inputs import Keys

    if names is None:
        if context is not None:
            raise typer.BadParameter("--context goes with --keys")
        return "auto"
    question, *rest = names.split(",")
    if not 1 <= len(rest) <= 2:
        raise typer.BadParameter(f"--keys {names}: expected Q,A or Q,A,OPTIONS")
    fronts = context.split(",") if context else []
    if len({question, *rest, *fronts}) < 1 + len(rest) + len(fronts):
        raise typer.BadParameter("--keys and --context name a field twice")
    return Keys(
        question=question,
        answer=rest[0],
        options=rest[1] if len(rest) == 2 else None,
        context=fronts,
    )


def validate(
    files: Annotated[
        list[Path],
        typer.Argument(help="Questions and answers: .json, .jsonl, .csv, .tsv or .parquet."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the problems as JSON.")] = False,
    keys: KeysOption = None,
    context: ContextOption = None,
) -> None:
    """List every problem of raw files at once: what it finds good, `add-task` takes.

    How long items are is known once the pipeline has made the base model.
    Example: dlplora validate my_task.json
    """
    from dlplora.data.ingest import validate as validate_file
    from dlplora.params.load import load_params
    from dlplora.project.files import Project
    from dlplora.project.own_tasks import item_limit

    named = _keys(keys, context)
    splits, limit = load_params().splits, item_limit(Project(Path()))
    found = {}
    unreadable = {}
    for file in files:
        try:
            found[str(file)] = validate_file(file, keys=named, splits=splits, limit=limit)
        except DlpLoraError as error:
            unreadable[str(file)] = str(error)
    if as_json:
        told = {name: asdict(checked) for name, checked in found.items()}
        typer.echo(json.dumps({"files": told, "unreadable": unreadable}, ensure_ascii=False))
    else:
        for message in unreadable.values():
            typer.echo(message)
        for name, checked in found.items():
            for row in checked.problems:
                typer.echo(row)
            if checked.whole is not None:
                typer.echo(f"{name}: {checked.whole}")
            for note in (*checked.notes, *(["good"] if checked.is_good else [])):
                typer.echo(f"{name}: {note}")
    if unreadable or not all(checked.is_good for checked in found.values()):
        raise typer.Exit(1)


def add_task(
    name: Annotated[str, typer.Argument(help="A letter, then up to 63 letters, digits or _.")],
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE|URL",
            help="Questions and answers: .json, .jsonl, .csv, .tsv or .parquet. A URL is imported "
            "by `dvc import-url`, and `dvc update` fetches it again.",
        ),
    ],
    primary: Annotated[
        Primary | None,
        typer.Option(help="What counts as its score; by the data if not given."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest answer to generate; from the training answers if not given."
        ),
    ] = None,
    answer_after: Annotated[
        str | None,
        typer.Option(
            help="Mark in front of the final answer, which alone is compared; found if it is ####."
        ),
    ] = None,
    keys: KeysOption = None,
    context: ContextOption = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="PEFT's folder of a LoRA adapter trained elsewhere; else one is trained."
        ),
    ] = None,
    wordings: Annotated[
        Path | None,
        typer.Option(
            help="YAML with train, validation and test: other wordings, {} for the question."
        ),
    ] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave bad items out instead of refusing.")
    ] = False,
) -> None:
    """Add a task of your own: copy FILE to data/raw/NAME and list it in params.yaml.

    Example: dlplora add-task capitals capitals.json
    """
    from dlplora.data.ingest import told
    from dlplora.project.files import Project
    from dlplora.project.own_tasks import add_task as add
    from dlplora.project.own_tasks import import_task

    project = Project(Path())
    options: dict[str, Any] = {
        "primary": primary,
        "max_new_tokens": max_new_tokens,
        "answer_after": answer_after,
        "keys": _keys(keys, context),
        "on_bad_row": "skip" if skip_bad_rows else "refuse",
        "adapter": adapter,
        "wordings": wordings,
    }
    if "://" in file:
        ingested = import_task(project, name, file, **options)
    else:
        ingested = add(project, name, Path(file), **options)
    sizes = ", ".join(f"{size.kept} {split}" for split, size in ingested.findings.splits.items())
    skipped = ingested.findings.skipped
    left_out = f", {skipped} bad rows left out" if skipped else ""
    for note in told(ingested.findings.controls, ingested.findings.stripped):
        typer.echo(note)
    typer.echo(f"added {name}: {sizes}{left_out}; {_NEXT}")


def remove_task(name: Annotated[str, typer.Argument(help="A task of params.yaml.")]) -> None:
    """Remove a task from params.yaml and its results from data/.

    Files of your own stay in data/raw/NAME and data/imported/NAME.
    Example: dlplora remove-task capitals
    """
    from dlplora.project.files import Project
    from dlplora.project.own_tasks import remove_task as remove

    pruned = remove(Project(Path()), name)
    typer.echo(f"removed {name} and {len(pruned)} results; run `make repro` to compare the rest")
    for kept in (Path("data/raw") / name, Path("data/imported") / name):
        if kept.exists():
            typer.echo(f"your files are kept in {kept}")


def set_(
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH=VALUE",
            help="Where a value stands in params.yaml, and the value as YAML: 16, null, [a, b]; "
            "text with a colon in quotes.",
        ),
    ] = None,
    unset: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="Remove an override; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the changes as JSON.")] = False,
) -> None:
    """Set values of params.yaml, all or none; the rest of the file stays as it is.

    A value in adapters.TASK overrides that of the section `adapter`.
    Example: dlplora set adapters.capitals.steps=30 adapters.capitals.rank=16
    """
    from dlplora.project.files import Project
    from dlplora.project.settings import parse_values, set_values

    if not values and not unset:
        raise typer.BadParameter("expected PATH=VALUE, or --unset PATH")
    changes = set_values(Project(Path()), parse_values(values or []), unset=unset or [])
    if as_json:
        changed = [asdict(change) for change in changes]
        typer.echo(json.dumps({"changed": changed}, ensure_ascii=False, default=lambda _: None))
        return
    for change in changes:
        typer.echo(change)
    if not changes:
        typer.echo("nothing changed: params.yaml holds these values already")


def prune() -> None:
    """Delete results of tasks, routers and systems that params.yaml no longer lists."""
    from dlplora.project.files import Project
    from dlplora.project.pruning import prune as delete

    for path in delete(Project(Path())):
        typer.echo(f"pruned {path}")


def repro(
    words: Annotated[
        list[str] | None, typer.Argument(help="Targets and options of `dvc repro`.")
    ] = None,
) -> None:
    """Prune, then run `dvc repro`; a second one in the same folder waits for the first.

    Example: dlplora repro report
    """
    from dlplora.project.files import Project
    from dlplora.project.repro import repro as run

    run(Project(Path()), words or [])
    typer.echo("Data and pipelines are up to date.")
    report = Path("data/report/index.html")
    if not words and report.is_file():
        typer.echo(f"The report is {report}, the scores are in data/comparison.json.")


def repro_suite(
    suite: Annotated[str, typer.Argument(help="A suite, such as compare.")],
) -> None:
    """Run a suite in a git worktree under .scratch/runs: your own tree stays as it is.

    Example: dlplora repro-suite compare
    """
    from dlplora.project.files import Project
    from dlplora.project.repro import repro_suite as run

    folder = run(Project(Path()), suite)
    typer.echo(f"{folder}/data/comparison.json and {folder}/data/report/index.html")


def find_clusters(
    count: Annotated[int, typer.Argument(min=1, help="How many clusters.")],
    write: Annotated[
        bool, typer.Option("--write", help="Write them into params.yaml, systems included.")
    ] = False,
    data: Annotated[Path, typer.Option(help="The folder that the pipeline writes to.")] = Path(
        "data"
    ),
) -> None:
    """Group the tasks by how alike their trained adapters change the base model.

    Tasks of one cluster get experts that are trained jointly.
    Example: dlplora find-clusters 3 --write
    """
    from dlplora.adapters import read_adapters
    from dlplora.lora import affinity
    from dlplora.params.load import load_params
    from dlplora.project.clusters import set_clusters
    from dlplora.project.files import Project
    from dlplora.records.base_card import read_base_card

    tasks = sorted(load_params().tasks)
    fingerprint = read_base_card(data / "base").fingerprint
    folders = [data / "adapters" / task for task in tasks]
    alike = affinity.affinities(read_adapters(folders, base_fingerprint=fingerprint))
    clusters = affinity.find_clusters(tasks, alike, count=count)
    for number, cluster in enumerate(clusters, start=1):
        typer.echo(f"cluster_{number}: [{', '.join(cluster)}]")
    if write:
        set_clusters(Project(Path()), clusters)
        typer.echo("params.yaml now holds these clusters; run `make repro`")


def use_suite(
    name: Annotated[str, typer.Argument(help="A file of suites/, without .yaml.")],
    force: Annotated[bool, typer.Option("--force", help="Lose edits of those sections.")] = False,
) -> None:
    """Switch params.yaml to the tasks, systems and sizes of a suite; your own tasks stay.

    Example: dlplora use-suite smoke
    """
    from dlplora.project.files import Project
    from dlplora.project.suites import use_suite as use

    kept = use(Project(Path()), name, force=force)
    typer.echo(f"params.yaml now holds suite {name}; {_NEXT}")
    if kept:
        typer.echo(f"your own tasks stay: {', '.join(kept)}")


def pin(
    path: Annotated[
        Path, typer.Argument(help="A transformers folder, a GGUF file or a folder of data.")
    ],
    with_code: Annotated[
        bool, typer.Option("--with-code", help="Its own code too, for trust_remote_code: true.")
    ] = False,
) -> None:
    """Print the hash that pins a base model or a folder of data in params.yaml.

    Example: dlplora pin model.gguf
    """
    from dlplora.data.checksums import pin_of

    typer.echo(pin_of(path, with_code=with_code))


def check_runtime() -> None:
    """Set runtime.dtype to float32 if this processor has no instructions for the one there is."""
    from dlplora.params.load import load_params
    from dlplora.project.files import Project, set_dtype
    from dlplora.runtime import is_supported

    runtime = load_params().runtime
    if is_supported(runtime.dtype):
        typer.echo(f"runtime: {runtime.dtype}, {runtime.threads} threads")
        return
    set_dtype(Project(Path()), "float32")
    typer.echo(f"runtime.dtype is now float32: this processor has no {runtime.dtype} instructions")
