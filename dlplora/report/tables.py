"""The tables of a report, as rows of text that the page and the markdown lay out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlplora.records.comparison import Comparison, Difference
from dlplora.records.findings import Findings
from dlplora.records.novelty import Novelties
from dlplora.records.scores import TaskScore
from dlplora.records.training import AdapterTraining
from dlplora.report.inputs import Timing

NOT_APPLICABLE = "n/a"


@dataclass(frozen=True)
class Cell:
    """A figure with what stands small beside it, and whether it is the best of its column."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Headed columns and rows of cells; the first column names the row."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def systems_by_tasks(comparison: Comparison) -> Table:
    """Lay out every system on every task with intervals, the best systems first."""
    ranked = sorted(comparison.summaries.values(), key=lambda summary: -summary.score)
    tasks = sorted(ranked[0].tasks)
    top = {task: max(summary.tasks[task].score for summary in ranked) for task in tasks}
    rows = []
    for summary in ranked:
        row = [
            Cell(summary.system, comparison.captions[summary.system]),
            Cell(f"{summary.score:.3f}", _span(summary.score_low, summary.score_high)),
            _fraction(comparison.normalised(summary.system)),
            _difference(comparison, summary.system),
            _fraction(summary.routing_accuracy),
            _fraction(summary.adapters_per_prompt, digits=2),
        ]
        for task in tasks:
            score = summary.tasks[task]
            row.append(
                Cell(
                    f"{score.score:.3f}",
                    _span(score.score_low, score.score_high),
                    best=score.score >= top[task],
                )
            )
        rows.append(row)
    head = ["system", "score", "normalised", _minus(comparison.reference)]
    return Table([*head, "routing accuracy", "adapters per prompt", *tasks], rows)


def interference(comparison: Comparison, shown: Sequence[str]) -> Table:
    """Lay out the reference and what systems gain or lose against it, task by task."""
    best = comparison.summaries[comparison.reference]
    rows = [
        [
            Cell(task),
            Cell(f"{best.tasks[task].score:.3f}"),
            *[
                cell
                for name in shown
                for cell in (
                    Cell(f"{comparison.summaries[name].tasks[task].score:.3f}"),
                    _signed(comparison.task_differences[name][task]),
                )
            ],
        ]
        for task in sorted(best.tasks)
    ]
    means = [Cell("mean over tasks"), Cell(f"{best.score:.3f}")]
    for name in shown:
        means += [
            Cell(f"{comparison.summaries[name].score:.3f}"),
            _signed(comparison.differences[name]),
        ]
    head = ["task", comparison.reference]
    head += [text for name in shown for text in (name, _minus(comparison.reference))]
    return Table(head, [*rows, means])


def by_setting(
    comparisons: Mapping[str, Comparison], timings: Sequence[Timing], *, routed: str
) -> Table:
    """Lay out how each system answered in each setting: quality, routing and seconds.

    `routed` says what counts as the right adapter.
    """
    seconds = {
        (timing.item, setting): taken
        for timing in timings
        for setting, taken in timing.parts.items()
    }
    rows = []
    for setting, comparison in comparisons.items():
        fastest = min(seconds[name, setting] for name in comparison.summaries)
        for name, summary in comparison.summaries.items():
            taken = seconds[name, setting]
            rows.append(
                [
                    Cell(setting),
                    Cell(name, comparison.captions[name]),
                    Cell(f"{summary.score:.3f}", _span(summary.score_low, summary.score_high)),
                    _difference(comparison, name),
                    _fraction(summary.routing_accuracy),
                    Cell(f"{taken:.1f}", f"{taken / fastest:.2f} × the fastest"),
                ]
            )
    head = ["setting", "system", "score", "difference", routed, "seconds"]
    return Table(head, rows)


def _minus(reference: str) -> str:
    return f"difference from {reference}"


def unseen_tasks(novelties: Novelties) -> Table:
    """Lay out how well each router's confidence tells texts of known tasks from others."""
    rows = [
        [
            Cell(task),
            Cell(router),
            Cell(f"{row.num_unseen} / {row.num_known}"),
            Cell(f"{row.auroc:.3f}"),
            Cell(f"{row.threshold:.3f}"),
            Cell(f"{row.kept:.3f}"),
            Cell(f"{row.refused:.3f}"),
        ]
        for task, routers in novelties.items()
        for router, row in routers.items()
    ]
    head = ["unseen", "router", "texts, unseen / known", "AUROC", "threshold", "kept", "refused"]
    return Table(head, rows)


def _difference(comparison: Comparison, system: str) -> Cell:
    if system == comparison.reference:
        return Cell("–")
    return _signed(comparison.differences[system])


def _signed(row: Difference) -> Cell:
    return Cell(f"{row.difference:+.3f}", f"{row.low:+.2f} … {row.high:+.2f}")


def _fraction(value: float | None, *, digits: int = 3) -> Cell:
    return Cell(NOT_APPLICABLE if value is None else f"{value:.{digits}f}")


def _span(low: float, high: float) -> str:
    return f"{low:.2f} – {high:.2f}"


def all_metrics(comparison: Comparison, shown: Sequence[str]) -> Table:
    """Lay out every metric of every task for the systems of `shown`."""
    names = ["accuracy", "exact_match", "bleu", "rouge1", "rougeL"]
    rows = [
        [
            Cell(task),
            Cell(system),
            Cell(str(score.n)),
            *[_metric(score, name) for name in names],
        ]
        for task in sorted(comparison.summaries[comparison.reference].tasks)
        for system in shown
        for score in [comparison.summaries[system].tasks[task]]
    ]
    return Table(["task", "system", "items", *names], rows)


def _metric(score: TaskScore, name: str) -> Cell:
    value = score.metrics.get(name)
    text = "–" if value is None else f"{value:.3f}"
    return Cell(text, best=name == score.primary)


def data_findings(
    findings: Mapping[str, Findings], trainings: Mapping[str, AdapterTraining]
) -> Table:
    """Lay out what ingest met in each task's raw file."""
    head = ["task", "kind", "read", "distinct", "merged", "skipped", "train", "validation", "test"]
    head += ["answers, most", "longest answer, tokens"]
    rows = []
    for task, found in sorted(findings.items()):
        training = trainings[task]
        counts = [found.read, found.distinct, found.merged, found.skipped]
        counts += [size.kept for size in found.splits.values()]
        counts.append(found.most_answers)
        kind = "multiple choice" if found.kind == "mcq" else "free answers"
        longest = "imported" if training.is_imported else f"{training.longest_answer_tokens:,}"
        rows.append(
            [Cell(task), Cell(kind), *[Cell(f"{count:,}") for count in counts], Cell(longest)]
        )
    return Table(head, rows)


def router_quality(routers: Mapping[str, Mapping[str, Any]]) -> Table:
    """Lay out how well each trained router does on held-out validation questions."""
    rows = [
        [
            Cell(name),
            Cell(f"{row['num_parameters']:,}"),
            Cell(f"{row['accuracy']:.4f}"),
            Cell(f"{row['calibration_error']:.4f}"),
        ]
        for name, row in sorted(routers.items())
    ]
    return Table(
        ["router", "parameters", "validation accuracy", "expected calibration error"], rows
    )


def routed_systems(comparison: Comparison) -> Table:
    """Lay out how each system routed the test items."""
    rows = [
        [
            Cell(name),
            _fraction(comparison.summaries[name].routing_accuracy),
            _fraction(routing.calibration_error),
            Cell(", ".join(f"{size} × {count}" for size, count in routing.num_adapters.items())),
        ]
        for name, routing in comparison.routing.items()
    ]
    head = ["system", "routing accuracy", "expected calibration error", "adapters × prompts"]
    return Table(head, rows)


def stage_costs(timings: Sequence[Timing]) -> Table:
    """Lay out runs, seconds and peak memory of each stage, the costliest first."""
    stages: dict[str, list[Timing]] = {}
    for timing in timings:
        stages.setdefault(timing.stage, []).append(timing)
    ranked = sorted(stages.items(), key=lambda pair: -sum(row.seconds for row in pair[1]))
    rows = [
        [
            Cell(stage),
            Cell(str(len(runs))),
            Cell(f"{sum(run.seconds for run in runs):,.1f}"),
            Cell(f"{max(run.seconds for run in runs):,.1f}"),
            Cell(f"{max(run.memory_mib for run in runs):,.0f}"),
        ]
        for stage, runs in ranked
    ]
    return Table(["stage", "runs", "seconds", "longest", "peak memory, MiB"], rows)
