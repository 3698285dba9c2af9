"""Stage `embedding_router`: make one router that reads by an embedder's vectors."""

from pathlib import Path

from dlplora.data.balance import read_labelled
from dlplora.data.wordings import read_no_task
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.runtime import set_up
from dlplora.stage import progress, run, write_timing
from dlplora.training.embedding_router import make_embedding_router


def main(
    name: str,
    embedder: Path,
    indexes: Path,
    router_data: Path,
    no_task: Path,
    out: Path,
    timing: Path,
) -> None:
    """Make the router NAME of an EMBEDDER with the INDEXES of all tasks or ROUTER_DATA, to OUT.

    Texts of NO_TASK say from which confidence on it is to be believed.
    """
    params = load_params()
    place = set_up(params.runtime, seed=params.seed)
    settings = named(params.embedding_routers, name, "embedding_routers")
    train = read_labelled(router_data / "train.parquet")
    with progress(name, total=len(train)) as advance:
        make_embedding_router(
            settings,
            embedder_folder=embedder,
            indexes=indexes,
            tasks=sorted(params.tasks),
            train=train,
            validation=read_labelled(router_data / "validation.parquet"),
            no_task=read_no_task(no_task).validation,
            index=params.index,
            place=place,
            advance=advance,
        ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
