"""Stage `router_data`: draw balanced router data from all tasks."""

from pathlib import Path

from dlplora.data.balance import balance, write_router_data
from dlplora.params.load import load_params
from dlplora.records.examples import examples_path, read_examples
from dlplora.stage import run, write_timing


def main(examples: Path, out: Path, timing: Path) -> None:
    """Write router data from the training and validation EXAMPLES of all tasks to OUT."""
    params = load_params()
    train, validation = (
        {task: read_examples(examples_path(examples, split, task)) for task in params.tasks}
        for split in ("train", "validation")
    )
    write_router_data(out, balance(train, validation, params=params.balance, seed=params.seed))
    write_timing(timing)


if __name__ == "__main__":
    run(main)
