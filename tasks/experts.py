"""Stage `experts`: train the experts of one cluster of tasks jointly."""

from pathlib import Path

from dlplora.models import load_base
from dlplora.params.load import load_params
from dlplora.params.overrides import expert_training_of
from dlplora.records.examples import examples_path, read_examples
from dlplora.runtime import set_up
from dlplora.scratch import checkpoint_folder, is_awaited
from dlplora.stage import progress, run, write_timing
from dlplora.training.checkpoint import checkpointed
from dlplora.training.experts import TaskExamples, train_experts


def main(cluster: str, base: Path, examples: Path, out: Path, timing: Path) -> None:
    """Train experts on the EXAMPLES of CLUSTER's tasks; write them, and folded ones, to OUT."""
    params = load_params()
    training = expert_training_of(params, cluster)
    experts = params.experts[cluster]
    files = {
        task: [examples_path(examples, split, task) for split in ("train", "validation")]
        for task in experts.tasks
    }
    title = f"experts {cluster}"
    folder = checkpoint_folder(
        title,
        params={
            "seed": params.seed,
            "runtime": params.runtime,
            "experts": experts,
            "training": training,
        },
        inputs=[base / "base.json", *(file for task in sorted(files) for file in files[task])],
    )
    with (
        checkpointed(folder, keep=lambda: is_awaited(title)) as checkpoint,
        progress(title, total=training.steps) as advance,
    ):
        train_experts(
            load_base(base, place=set_up(params.runtime, seed=params.seed), trains=True),
            {task: TaskExamples(*map(read_examples, own)) for task, own in files.items()},
            name=cluster,
            experts=experts,
            training=training,
            seed=params.seed,
            kernels=params.runtime.kernels,
            checkpoint=checkpoint,
            advance=advance,
        ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
