"""Stage `retriever_data`: draw what an embedder is trained further on."""

from pathlib import Path

from dlplora.data.balance import balance, write_router_data
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.records.examples import examples_path, read_examples
from dlplora.stage import run, write_timing


def main(name: str, examples: Path, out: Path, timing: Path) -> None:
    """Write balanced questions of the tasks that the embedder NAME learns from to OUT."""
    params = load_params()
    tasks = named(params.tuned_embedders, name, "tuned_embedders").tasks
    train, validation = (
        {task: read_examples(examples_path(examples, split, task)) for task in tasks}
        for split in ("train", "validation")
    )
    write_router_data(out, balance(train, validation, params=params.balance, seed=params.seed))
    write_timing(timing)


if __name__ == "__main__":
    run(main)
