"""Stage `evaluate_gated`: score a router's mix of experts on the test examples of every task."""

from pathlib import Path

from dlplora.evaluation.run import Test, answer_tests
from dlplora.evaluation.systems import build_gated
from dlplora.models import load_base
from dlplora.params import load_params, named
from dlplora.records.examples import read_examples
from dlplora.runtime import set_up
from dlplora.stage import run, write_timing


def main(
    system: str, base: Path, experts: Path, router: Path, tests: Path, out: Path, timing: Path
) -> None:
    """Answer the TESTS by BASE with the EXPERTS that SYSTEM mixes by ROUTER; write to OUT."""
    params = load_params()
    settings = named(params.gated_systems, system, "gated_systems")
    tasks = sorted(params.tasks)
    loaded = load_base(base, place=set_up(params.runtime, seed=params.seed), attention="sdpa")
    answer_tests(
        loaded,
        build_gated(settings, loaded, base_folder=base, experts=experts, router=router),
        [Test(read_examples(tests / f"{task}.parquet"), params.tasks[task]) for task in tasks],
        name=system,
        evaluation=params.evaluation,
        seed=params.seed,
    ).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
