"""Stage `novelty`: compare the routers' confidence on known tasks and on an unseen one."""

from pathlib import Path

from dlplora.data.ingest import ingest
from dlplora.evaluation.novelty import measure_novelty
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.params.names import router_names
from dlplora.records.examples import read_examples
from dlplora.records.novelty import write_novelty
from dlplora.routing.build import load_classifier
from dlplora.runtime import set_up
from dlplora.stage import run, write_timing


def main(
    task: str, raw: Path, routers: Path, base: Path, tests: Path, out: Path, timing: Path
) -> None:
    """Ask all ROUTERS, reading by the tokenizer of BASE, about TESTS and the RAW file of TASK."""
    params = load_params()
    unseen = named(params.unseen_tasks, task, "unseen_tasks")
    set_up(params.runtime, seed=params.seed)
    found = ingest(
        raw,
        task,
        keys=unseen.keys,
        on_bad_row=unseen.on_bad_row,
        splits=params.splits,
        limit=None,
    )
    tasks = sorted(params.tasks)
    known = [
        example.question for name in tasks for example in read_examples(tests / f"{name}.parquet")
    ]
    strange = [example.question for example in found.examples["test"]]
    novelty = {
        name: measure_novelty(
            load_classifier(routers / name, base=base, tasks=tasks), known, strange
        )
        for name in router_names(params)
    }
    write_novelty(out, novelty)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
