"""Stage `evaluate_base`: score the base model alone on one task."""

from pathlib import Path

from dlplora.evaluation.run import System, Test, answer_tests
from dlplora.models import load_base
from dlplora.params import load_params, named
from dlplora.records.examples import read_examples
from dlplora.routing.simple import BaseRouter
from dlplora.runtime import set_up
from dlplora.stage import run, write_timing


def main(task: str, base: Path, test: Path, out: Path, timing: Path) -> None:
    """Answer the TEST examples of TASK by BASE; write the scores to OUT."""
    params = load_params()
    place = set_up(params.runtime, seed=params.seed)
    answer_tests(
        load_base(base, place=place, attention="sdpa"),
        System([], lambda _: BaseRouter()),
        [Test(read_examples(test), named(params.tasks, task, "tasks"))],
        name="base",
        evaluation=params.evaluation,
        seed=params.seed,
    ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
