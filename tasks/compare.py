"""Stage `compare`: put all systems side by side."""

from pathlib import Path

from dlplora.evaluation.compare import BY_TASK, compare
from dlplora.evaluation.settings import ORACLE, POLICIES, composite_primaries
from dlplora.params import load_params
from dlplora.records.comparison import write_comparisons
from dlplora.records.novelty import read_novelty
from dlplora.records.scores import IID
from dlplora.stage import run, write_timing


def main(scores: Path, out: Path, metrics: Path, timing: Path) -> None:
    """Compare the SCORES of all systems; write what the report needs to OUT, and METRICS."""
    params = load_params()
    comparisons = [
        compare(
            scores,
            setting=IID,
            primaries={task: params.tasks[task].primary for task in sorted(params.tasks)},
            systems=[*BY_TASK, *params.systems, *params.gated_systems, *params.arrow],
            reference="single",
            seed=params.seed,
        )
    ]
    comparisons += [
        compare(
            scores,
            setting=setting,
            primaries=composite_primaries(params.tasks),
            systems=list(POLICIES),
            reference=ORACLE,
            seed=params.seed,
        )
        for setting in params.composite_settings
    ]
    novelties = {
        task: read_novelty(scores / "novelty" / f"{task}.json")
        for task in sorted(params.unseen_tasks)
    }
    write_comparisons(out, metrics, comparisons, novelties)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
