"""Stage `joint`: train one LoRA adapter on all tasks together."""

from pathlib import Path

from dlplora.models import load_base
from dlplora.params.load import load_params
from dlplora.params.overrides import joint_of
from dlplora.records.examples import examples_path, read_examples
from dlplora.runtime import set_up
from dlplora.scratch import checkpoint_folder, is_awaited
from dlplora.stage import progress, run, write_timing
from dlplora.training.checkpoint import checkpointed
from dlplora.training.joint import train_joint_adapter


def main(name: str, base: Path, examples: Path, out: Path, timing: Path) -> None:
    """Train the adapter NAME on the EXAMPLES of all tasks; write it, with its curve, to OUT."""
    params = load_params()
    settings, tasks = joint_of(params, name), sorted(params.tasks)
    train = {task: examples_path(examples, "train", task) for task in tasks}
    validation = {task: examples_path(examples, "validation", task) for task in tasks}
    title = f"joint {name}"
    folder = checkpoint_folder(
        title,
        params={"seed": params.seed, "runtime": params.runtime, "adapter": settings},
        inputs=[base / "base.json", *train.values(), *validation.values()],
    )
    with (
        checkpointed(folder, keep=lambda: is_awaited(title)) as checkpoint,
        progress(title, total=settings.steps) as advance,
    ):
        train_joint_adapter(
            load_base(base, place=set_up(params.runtime, seed=params.seed), trains=True),
            {task: read_examples(path) for task, path in train.items()},
            {task: read_examples(path) for task, path in validation.items()},
            name=name,
            params=settings,
            seed=params.seed,
            kernels=params.runtime.kernels,
            checkpoint=checkpoint,
            advance=advance,
        ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
