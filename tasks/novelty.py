"""Stage `novelty`: compare the routers' confidence in texts of known tasks and in others."""

from pathlib import Path

from dlplora.evaluation.novelty import measure_novelty, unseen_texts
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.params.names import router_names
from dlplora.records.examples import read_examples
from dlplora.records.novelty import write_novelty
from dlplora.records.router_card import read_fallback
from dlplora.routing.build import load_classifier
from dlplora.runtime import set_up
from dlplora.stage import run, write_timing


def main(
    task: str, raw: Path, routers: Path, base: Path, tests: Path, out: Path, timing: Path
) -> None:
    """Ask all ROUTERS, reading by the tokenizer of BASE, about TESTS and the RAW file of TASK."""
    params = load_params()
    set_up(params.runtime, seed=params.seed)
    unseen = unseen_texts(
        raw, task, named(params.unseen_tasks, task, "unseen_tasks"), params.splits
    )
    tasks = sorted(params.tasks)
    examples = [row for name in tasks for row in read_examples(tests / f"{name}.parquet")]
    known = [text for row in examples for text in (row.question, row.reworded) if text]
    novelty = {
        name: measure_novelty(
            load_classifier(routers / name, base=base, tasks=tasks),
            known,
            unseen,
            threshold=read_fallback(routers / name),
        )
        for name in router_names(params)
    }
    write_novelty(out, novelty)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
