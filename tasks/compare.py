"""Stage `compare`: put all systems side by side."""

from pathlib import Path

from dlplora.evaluation.compare import compare
from dlplora.evaluation.settings import primaries_in, systems_in
from dlplora.params.load import load_params
from dlplora.params.project import REFERENCE
from dlplora.records.comparison import write_comparisons, write_metrics
from dlplora.records.novelty import read_novelty
from dlplora.records.training import read_adapter_training
from dlplora.stage import run, write_timing
from dlplora.words import NUM_QUESTIONS


def main(
    scores: Path, adapters: Path, out: Path, comparison: Path, metrics: Path, timing: Path
) -> None:
    """Compare the SCORES of systems; write to OUT, and in short to COMPARISON and METRICS."""
    params = load_params()
    comparisons = [
        compare(
            scores,
            setting=setting,
            primaries=primaries_in(setting, params.tasks),
            systems={name: params.systems[name] for name in systems},
            reference=REFERENCE,
            default=params.default_system,
            seed=params.seed,
        )
        for setting in NUM_QUESTIONS
        if (systems := systems_in(setting, params))
    ]
    novelties = {
        task: read_novelty(scores / "novelty" / f"{task}.json")
        for task in sorted(params.unseen_tasks)
    }
    trainings = {task: read_adapter_training(adapters / task) for task in sorted(params.tasks)}
    write_comparisons(out, comparisons, novelties, trainings)
    write_metrics(comparison, metrics, comparisons)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
