"""The report: one self-contained HTML page, and the same as markdown with its pictures."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dlplora.records.files import written_folder
from dlplora.report import plots, tables
from dlplora.report.inputs import Inputs

_HEADLINE = ("base", "single", "dlp_mlp")
_JOINT = ("cgc", "multitask")
_SYSTEMS = {
    "base": "the model without adapters",
    "single": "each task with its own adapter (it is told the task)",
    "random": "one adapter at random",
    "uniform": "all adapters alike",
    "dlp_mlp": "adapters by DLP-LoRA's mini-MLP, top-p",
    "dlp_mlp_top1": "its first choice alone",
    "dlp_encoder": "adapters by DLP-LoRA's other router, a pretrained encoder",
    "tfidf": "the first choice of TF-IDF and logistic regression",
    "cgc": "CGC-LoRA, common and own experts trained jointly (it is told the task)",
    "cgc_routed": "the same experts, mixed by the mini-MLP's probabilities",
    "retriever_selection": "the adapter most similar to the text (LoraRetriever)",
    "retriever_mixture": "the three most similar, mixed alike",
    "retriever_fusion": "the three most similar, their matrices averaged",
    "logo_norm": "the three adapters that would add most to one layer (LoGo)",
    "logo_entropy": "the three whose addition there is the surest",
    "logo_calibrated": "as logo_norm, relative to what each adds to texts of no task",
    "knn": "the vote of the five nearest router texts by embedding",
    "centroid": "the task of the nearest mean embedding",
    "multitask": "one adapter trained on all tasks together",
    "multitask_wide": "the same with the ranks of all adapters together",
    "merge_cat": "all adapters merged exactly, as uniform",
    "merge_svd": "that cut to the rank of one",
    "merge_linear": "their matrices averaged",
    "merge_ties": "their matrices merged by TIES",
    "merge_dare_ties": "their matrices merged by DARE and TIES",
    "arrow": "adapters weighed token by token on each layer",
    "lorahub": "adapters weighed for each task by five of its examples (it is told the task)",
}


def write_report(inputs: Inputs, out: Path) -> None:
    """Write index.html, report.md and figures/ to a folder."""
    charts = _charts(inputs)
    svgs = {name: plots.to_svg(chart) for name, chart in charts.items()}
    shown = _content(inputs)
    with written_folder(out) as aside:
        page = _template("page.html.jinja", autoescape=True)
        figures = {name: Markup(svg) for name, svg in svgs.items()}
        (aside / "index.html").write_text(
            page.render(**shown, figures=figures, css=_css()), encoding="utf-8"
        )
        markdown = _template("report.md.jinja", autoescape=False)
        (aside / "report.md").write_text(
            markdown.render(**shown, figures=list(charts)), encoding="utf-8"
        )
        (aside / "figures").mkdir()
        for name, svg in svgs.items():
            (aside / "figures" / f"{name}.svg").write_text(svg, encoding="utf-8")


def _template(name: str, *, autoescape: bool) -> Any:
    environment = Environment(
        loader=PackageLoader("dlplora.report", "."),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _markdown_cell, "line": _markdown_line}
    return environment.get_template(name)


def _css() -> Markup:
    return Markup((Path(__file__).parent / "page.css.jinja").read_text(encoding="utf-8"))


def _markdown_cell(cell: tables.Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return _markdown_line(f"{text} ({cell.note})" if cell.note else text)


def _markdown_line(text: str) -> str:
    """Keep any text within one line and one cell of a table, and from being read as HTML."""
    escaped = " ".join(text.split()).replace("|", "\\|")
    return escaped.replace("<", "&lt;")


def _charts(inputs: Inputs) -> dict[str, Any]:
    comparison = inputs.comparison
    charts = {
        "scores_by_system": plots.scores_by_system(comparison),
        "scores_by_task": plots.scores_by_task(comparison, _headline(inputs)),
        "stage_seconds": plots.stage_seconds(inputs.timings),
    }
    if joint := _joint(inputs):
        charts["seesaw"] = plots.seesaw(comparison, joint)
    if any(training.curve.points for training in inputs.trainings.values()):
        charts["learning_curves"] = plots.learning_curves(inputs.trainings)
    if comparison.routing:
        charts["adapters_per_prompt"] = plots.adapters_per_prompt(comparison.routing)
    for name in _learned(inputs):
        charts[f"confusion_{name}"] = plots.confusion_matrix(comparison.routing[name])
    return charts


def _headline(inputs: Inputs) -> list[str]:
    return [name for name in _HEADLINE if name in inputs.comparison.summaries]


def _joint(inputs: Inputs) -> list[str]:
    """Return the systems there are whose tasks were trained together."""
    return [name for name in _JOINT if name in inputs.comparison.summaries]


def _glossary(systems: Iterable[str]) -> str:
    """Say what a score is and what the known systems among those shown are."""
    said = "; ".join(f"{name}: {_SYSTEMS[name]}" for name in systems if name in _SYSTEMS)
    return (
        f"A score is the mean over tasks of each task's primary metric, normalised by that of "
        f"single; answers are cut at the task's token limit. {said}."
    )


def _learned(inputs: Inputs) -> list[str]:
    """Return the systems whose router gives confidences."""
    routing = inputs.comparison.routing
    return [name for name, row in routing.items() if row.calibration_error is not None]


def _content(inputs: Inputs) -> Mapping[str, Any]:
    comparison = inputs.comparison
    return {
        "glossary": _glossary(comparison.summaries),
        "headline": [comparison.summaries[name] for name in _headline(inputs)],
        "num_systems": len(comparison.summaries),
        "num_items": sum(task.n for task in comparison.summaries["single"].tasks.values()),
        "tasks": sorted(inputs.findings),
        "learned": _learned(inputs),
        "systems": tables.systems_by_tasks(comparison),
        "seesaw": tables.seesaw(comparison, joint) if (joint := _joint(inputs)) else None,
        "metrics": tables.all_metrics(comparison, _headline(inputs)),
        "routing": tables.routed_systems(comparison),
        "unseen": tables.unseen_tasks(inputs.novelties),
        "composites": tables.composites_by_policy(inputs.composites, inputs.timings),
        "routers": tables.router_quality(inputs.routers),
        "findings": tables.data_findings(inputs.findings, inputs.trainings),
        "problems": {
            task: [f"{found.unit} {row.item} {row.problem}" for row in found.problems[:5]]
            for task, found in inputs.findings.items()
            if found.problems
        },
        "stages": tables.stage_costs(inputs.timings),
        "total_seconds": sum(timing.seconds for timing in inputs.timings),
        "samples": comparison.samples,
        "machine": inputs.machine,
    }
