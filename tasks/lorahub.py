"""Stage `lorahub`: compose an adapter for each task of all by a few of its training examples."""

from pathlib import Path

from dlplora.models import load_base
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.records.examples import examples_path, read_examples
from dlplora.runtime import set_up
from dlplora.stage import progress, run, write_timing
from dlplora.training.lorahub import compose_by_examples


def main(name: str, base: Path, adapters: Path, examples: Path, out: Path, timing: Path) -> None:
    """Weigh the ADAPTERS for each task by its training EXAMPLES, as NAME says; write to OUT."""
    params = load_params()
    chosen, tasks = named(params.lorahub, name, "lorahub"), sorted(params.tasks)
    with progress(f"lorahub {name}", total=len(tasks) * chosen.steps) as advance:
        compose_by_examples(
            load_base(base, place=set_up(params.runtime, seed=params.seed)),
            {task: adapters / task for task in tasks},
            {task: read_examples(examples_path(examples, "train", task)) for task in tasks},
            params=chosen,
            seed=params.seed,
            advance=advance,
        ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
