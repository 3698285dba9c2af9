"""The command that serves."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def serve(
    model: Annotated[
        Path | None,
        typer.Option(
            help="A model's folder or a link to it, which is followed, or a pipeline's data.",
            show_default=".models/current if there is one, else data",
        ),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            help="What answers by default; given again, others that requests may name as model.",
            show_default="default_system of the model's params",
        ),
    ] = None,
    all_systems: Annotated[
        bool,
        typer.Option("--all-systems", help="Serve all systems that need no task and are there."),
    ] = False,
    host: Annotated[str, typer.Option(help="Where to listen; other machines need keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="A file of keys, one a line; or $DLPLORA_API_KEYS.")
    ] = None,
    admin_keys: Annotated[
        Path | None,
        typer.Option(help="Keys that may load adapters at run time; or $DLPLORA_ADMIN_KEYS."),
    ] = None,
    adapters_from: Annotated[
        list[Path] | None,
        typer.Option(help="A folder that adapters may be loaded from; may be given again."),
    ] = None,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Answers written at once.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; more: 429.")] = 256,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The longest answer where a request sets no limit.")
    ] = 256,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="The longest request.")] = 600.0,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="The largest body.")] = 8.0,
    max_n: Annotated[int, typer.Option(min=1, help="The most answers to a prompt.")] = 16,
    max_prompts: Annotated[int, typer.Option(min=1, help="The most prompts in a body.")] = 64,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long answers may run on after SIGTERM or a switch.")
    ] = 30.0,
    log: Annotated[Path | None, typer.Option(help="Where decisions are logged.")] = Path(
        "logs/decisions.jsonl"
    ),
    max_log_mib: Annotated[
        float, typer.Option(min=0.01, help="How large that file grows; nine older ones are kept.")
    ] = 64.0,
    adapter_mib: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Memory of a pool of adapters in MiB; others are copied in when routed to.",
            show_default="all adapters stay in memory",
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="auto: bfloat16 if this machine has instructions for it."),
    ] = "auto",
    no_log: Annotated[bool, typer.Option("--no-log", help="Log no decisions.")] = False,
) -> None:
    """Serve a model by OpenAI's API; the adapters are chosen for each request.

    Another version in .models/current is taken over while it serves. Ctrl-C or SIGTERM lets running
    answers end.
    Example: dlplora serve --port 8000
    """
    if all_systems and system:
        raise typer.BadParameter("--all-systems serves all; leave out --system")
    import torch

    from dlplora.runtime import Place, best_place
    from dlplora.serving.app import Bounds
    from dlplora.serving.keys import read_keys
    from dlplora.serving.server import Settings
    from dlplora.serving.server import serve as run

    current = Path(".models/current")
    settings = Settings(
        systems="all" if all_systems else system or [],
        keys=read_keys(keys, admin_keys),
        adapter_folders=adapters_from or [],
        bounds=Bounds(
            max_body_bytes=int(max_body_mib * 2**20),
            max_n=max_n,
            max_prompts=max_prompts,
            seconds=max_seconds,
        ),
        max_queue=max_queue,
        max_batch_size=max_batch_size,
        max_new_tokens=max_new_tokens,
        drain_seconds=drain_seconds,
        log=None if no_log else log,
        max_log_mib=max_log_mib,
        adapter_mib=adapter_mib,
        place=None if dtype == "auto" else Place(best_place().device, getattr(torch, dtype)),
    )
    folder = model or (current if current.is_symlink() else Path("data"))
    run(folder, settings, host=host, port=port)
