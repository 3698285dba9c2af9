"""Stage `adapter`: train the LoRA adapter of one task."""

from pathlib import Path

from dlplora.models import load_base
from dlplora.params import load_params
from dlplora.records.examples import examples_path, read_examples
from dlplora.runtime import set_up
from dlplora.stage import progress, run, write_timing
from dlplora.training.adapter import train_adapter


def main(task: str, base: Path, examples: Path, out: Path, timing: Path) -> None:
    """Train an adapter of BASE on the EXAMPLES of TASK; write it, with its curve, to OUT."""
    params = load_params()
    settings = params.adapter_of(task)
    place = set_up(params.runtime, seed=params.seed)
    with progress(f"adapter {task}", total=settings.steps) as advance:
        trained = train_adapter(
            load_base(base, place=place, attention="eager"),
            read_examples(examples_path(examples, "train", task)),
            read_examples(examples_path(examples, "validation", task)),
            params=settings,
            seed=params.seed,
            advance=advance,
        )
    trained.save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
