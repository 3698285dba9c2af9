"""Stage `evaluate_single`: score one task's own adapter on it."""

from pathlib import Path

from dlplora.adapters import read_adapter
from dlplora.evaluation.run import System, Test, answer_tests
from dlplora.models import load_base
from dlplora.params import load_params, named
from dlplora.records.examples import read_examples
from dlplora.routing.simple import FixedRouter
from dlplora.runtime import set_up
from dlplora.stage import run, write_timing


def main(task: str, base: Path, adapter: Path, test: Path, out: Path, timing: Path) -> None:
    """Answer the TEST examples of TASK by BASE with its ADAPTER; write the scores to OUT."""
    params = load_params()
    loaded = load_base(base, place=set_up(params.runtime, seed=params.seed), attention="sdpa")
    answer_tests(
        loaded,
        System(
            [read_adapter(adapter, base_fingerprint=loaded.fingerprint)],
            lambda _: FixedRouter(task),
        ),
        [Test(read_examples(test), named(params.tasks, task, "tasks"))],
        name="single",
        evaluation=params.evaluation,
        seed=params.seed,
    ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
