"""Stage `compare`: put all systems side by side."""

from pathlib import Path

from dlplora.evaluation.compare import compare
from dlplora.params import load_params
from dlplora.records.comparison import write_comparison
from dlplora.records.scores import IID
from dlplora.stage import run, write_timing


def main(scores: Path, out: Path, metrics: Path, timing: Path) -> None:
    """Compare the SCORES of all systems; write what the report needs to OUT, and METRICS."""
    params = load_params()
    comparison = compare(
        scores,
        setting=IID,
        primaries={task: params.tasks[task].primary for task in sorted(params.tasks)},
        systems=list(params.systems),
        seed=params.seed,
    )
    write_comparison(out, metrics, comparison)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
