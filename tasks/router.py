"""Stage `router`: train one router."""

from pathlib import Path

from dlplora.data.balance import read_labelled
from dlplora.data.wordings import read_no_task
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.runtime import set_up
from dlplora.scratch import checkpoint_folder, is_awaited
from dlplora.stage import progress, run, write_timing
from dlplora.training.checkpoint import checkpointed
from dlplora.training.router import num_steps, train_router


def main(name: str, router_data: Path, no_task: Path, reads: Path, out: Path, timing: Path) -> None:
    """Train the router NAME on ROUTER_DATA and texts of NO_TASK, by what READS holds, to OUT."""
    params = load_params()
    settings = named(params.routers, name, "routers")
    set_up(params.runtime, seed=params.seed)
    title = f"router {name}"
    folder = checkpoint_folder(
        title,
        params={"seed": params.seed, "runtime": params.runtime.without_kernels, "router": settings},
        inputs=[
            *sorted(router_data.glob("*.parquet")),
            *sorted(path for path in reads.rglob("*") if path.is_file()),
        ],
    )
    train = read_labelled(router_data / "train.parquet")
    with (
        checkpointed(folder, keep=lambda: is_awaited(title)) as checkpoint,
        progress(title, total=num_steps(settings, num_rows=len(train))) as advance,
    ):
        train_router(
            train,
            read_labelled(router_data / "validation.parquet"),
            settings,
            no_task=read_no_task(no_task).validation,
            reads=reads,
            seed=params.seed,
            checkpoint=checkpoint,
            title=title,
            advance=advance,
        ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
