"""Stage `adapter`: train the LoRA adapter of one task."""

from pathlib import Path

from dlplora.models import load_base
from dlplora.params.load import load_params
from dlplora.params.overrides import adapter_of
from dlplora.records.examples import examples_path, read_examples
from dlplora.runtime import set_up
from dlplora.scratch import checkpoint_folder, is_awaited
from dlplora.stage import progress, run, write_timing
from dlplora.training.adapter import train_adapter
from dlplora.training.checkpoint import checkpointed


def main(task: str, base: Path, examples: Path, out: Path, timing: Path) -> None:
    """Train an adapter on the EXAMPLES of TASK; write it, with its curve, to OUT."""
    params = load_params()
    settings = adapter_of(params, task)
    train, validation = (examples_path(examples, split, task) for split in ("train", "validation"))
    title = f"adapter {task}"
    folder = checkpoint_folder(
        title,
        params={"seed": params.seed, "runtime": params.runtime, "adapter": settings},
        inputs=[base / "base.json", train, validation],
    )
    with (
        checkpointed(folder, keep=lambda: is_awaited(title)) as checkpoint,
        progress(title, total=settings.steps) as advance,
    ):
        train_adapter(
            load_base(base, place=set_up(params.runtime, seed=params.seed), trains=True),
            read_examples(train),
            read_examples(validation),
            name=task,
            params=settings,
            seed=params.seed,
            kernels=params.runtime.kernels,
            checkpoint=checkpoint,
            advance=advance,
        ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
