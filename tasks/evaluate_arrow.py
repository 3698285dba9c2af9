"""Stage `evaluate_arrow`: score all adapters, weighed token by token, on every task's test."""

from pathlib import Path

from dlplora.evaluation.run import System, Test, answer_tests
from dlplora.models import load_base
from dlplora.params import load_params, named
from dlplora.records.examples import read_examples
from dlplora.routing.simple import BaseRouter
from dlplora.runtime import set_up
from dlplora.stage import run, write_timing
from dlplora.training.arrow import put_arrow


def main(name: str, base: Path, adapters: Path, tests: Path, out: Path, timing: Path) -> None:
    """Answer the TESTS by BASE with all ADAPTERS, as NAME weighs them; write to OUT."""
    params = load_params()
    tasks = sorted(params.tasks)
    loaded = load_base(base, place=set_up(params.runtime, seed=params.seed), attention="sdpa")
    put_arrow(
        loaded,
        [adapters / task for task in tasks],
        params=named(params.arrow, name, "arrow"),
        seed=params.seed,
    )
    answer_tests(
        loaded,
        System([], lambda _: BaseRouter(), weighs_tokens=True),
        [Test(read_examples(tests / f"{task}.parquet"), params.tasks[task]) for task in tasks],
        name=name,
        evaluation=params.evaluation,
        seed=params.seed,
    ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
