"""Stage `evaluate`: score one routed system on the test examples of every task."""

from pathlib import Path

from dlplora.evaluation.run import Test, answer_tests
from dlplora.evaluation.systems import Inputs, build_system
from dlplora.models import load_base
from dlplora.params import load_params, named
from dlplora.records.examples import read_examples
from dlplora.runtime import set_up
from dlplora.stage import run, write_timing


def main(
    system: str, base: Path, adapters: Path, artifact: Path, tests: Path, out: Path, timing: Path
) -> None:
    """Answer the TESTS by BASE with the ADAPTERS that SYSTEM picks by ARTIFACT; write to OUT."""
    params = load_params()
    tasks = sorted(params.tasks)
    loaded = load_base(base, place=set_up(params.runtime, seed=params.seed), attention="sdpa")
    inputs = Inputs(loaded, base, adapters, artifact, tasks, params.seed)
    answer_tests(
        loaded,
        build_system(named(params.systems, system, "systems"), inputs),
        [Test(read_examples(tests / f"{task}.parquet"), params.tasks[task]) for task in tasks],
        name=system,
        evaluation=params.evaluation,
        seed=params.seed,
    ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
