"""Stage `tuned_embedder`: train a sentence embedder further on the questions of some tasks."""

from pathlib import Path

from dlplora.data.balance import read_labelled
from dlplora.data.checksums import embedder_files
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.routing.embedding import Embedder
from dlplora.runtime import set_up
from dlplora.scratch import checkpoint_folder, is_awaited
from dlplora.stage import progress, run, write_timing
from dlplora.training.checkpoint import checkpointed
from dlplora.training.retriever import tune_embedder


def main(name: str, embedder: Path, data: Path, out: Path, timing: Path) -> None:
    """Train the EMBEDDER further on DATA; write it as NAME to OUT."""
    params = load_params()
    settings = named(params.tuned_embedders, name, "tuned_embedders")
    place = set_up(params.runtime, seed=params.seed)
    title = f"tuned_embedder {name}"
    files = [data / "train.parquet", data / "validation.parquet"]
    folder = checkpoint_folder(
        title,
        params={
            "seed": params.seed,
            "runtime": params.runtime.without_kernels,
            "index": params.index,
            "tuned_embedder": settings,
        },
        inputs=[*embedder_files(embedder), *files],
    )
    with (
        checkpointed(folder, keep=lambda: is_awaited(title)) as checkpoint,
        progress(title, total=settings.steps) as advance,
    ):
        tune_embedder(
            Embedder.load(embedder, device=place.device),
            *map(read_labelled, files),
            params=settings,
            instruction=params.index.instruction,
            seed=params.seed,
            checkpoint=checkpoint,
            advance=advance,
        ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
