"""Stage `index`: embed one task's adapter, so that it can be retrieved."""

from pathlib import Path

from dlplora.params.load import load_params
from dlplora.params.names import embedder_names
from dlplora.records.examples import read_examples
from dlplora.routing.embedding import Embedder
from dlplora.routing.retriever import embed_adapter, write_index
from dlplora.runtime import set_up
from dlplora.stage import run, write_timing


def main(task: str, embedders: Path, train: Path, out: Path, timing: Path) -> None:
    """Write the embedding of the adapter of TASK, by its TRAIN file and each of EMBEDDERS."""
    params = load_params()
    place = set_up(params.runtime, seed=params.seed)
    questions = [example.question for example in read_examples(train)]
    found = {
        name: embed_adapter(
            Embedder.load(embedders / name, device=place.device),
            questions,
            index=params.index,
            seed=params.seed,
        )
        for name in embedder_names(params)
    }
    write_index(out, found)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
