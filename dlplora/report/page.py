"""The report: one self-contained HTML page, and the same as markdown with its pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dlplora.records.comparison import Comparison
from dlplora.records.files import written_folder
from dlplora.report import plots, tables
from dlplora.report.inputs import Inputs
from dlplora.words import NUM_QUESTIONS

_SEVERAL: set[str] = {setting for setting, count in NUM_QUESTIONS.items() if count > 1}


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
    if joint := comparison.joint:
        charts["interference"] = plots.interference(comparison, joint)
    if any(training.curve.points for training in inputs.trainings.values()):
        charts["learning_curves"] = plots.learning_curves(inputs.trainings)
    if comparison.routing:
        charts["adapters_per_prompt"] = plots.adapters_per_prompt(comparison.routing)
    if worded := _worded(inputs):
        charts["wordings"] = plots.scores_by_setting({comparison.setting: comparison, **worded})
        for setting, found in worded.items():
            shown = [name for name in _headline(inputs) if name in found.summaries]
            charts[f"{setting}_by_task"] = plots.scores_by_task(found, shown)
    if several := _several(inputs):
        charts["multi_question"] = plots.scores_by_position(several)
    for name in _learned(inputs):
        charts[f"confusion_{name}"] = plots.confusion_matrix(comparison.routing[name])
    return charts


def _worded(inputs: Inputs) -> dict[str, Comparison]:
    """Return the settings that ask the test items in another way, one by one."""
    return {name: found for name, found in inputs.others.items() if name not in _SEVERAL}


def _several(inputs: Inputs) -> dict[str, Comparison]:
    """Return the settings whose prompts hold several questions."""
    return {name: found for name, found in inputs.others.items() if name in _SEVERAL}


def _headline(inputs: Inputs) -> list[str]:
    """Return the systems that stand first: the first of all, the reference, the default."""
    comparison = inputs.comparison
    first = next(iter(comparison.summaries))
    names = dict.fromkeys([first, comparison.reference, comparison.default])
    return [name for name in names if name in comparison.summaries]


def _learned(inputs: Inputs) -> list[str]:
    """Return the systems whose router gives confidences."""
    routing = inputs.comparison.routing
    return [name for name, row in routing.items() if row.calibration_error is not None]


def _content(inputs: Inputs) -> Mapping[str, Any]:
    comparison = inputs.comparison
    settings = [comparison, *inputs.others.values()]
    worded = _worded(inputs)
    return {
        "reference": comparison.reference,
        "headline": [comparison.summaries[name] for name in _headline(inputs)],
        "default": comparison.summaries.get(comparison.default),
        "num_systems": len({name for found in settings for name in found.summaries}),
        "num_items": sum(
            task.n for task in comparison.summaries[comparison.reference].tasks.values()
        ),
        "tasks": sorted(inputs.findings),
        "learned": _learned(inputs),
        "systems": tables.systems_by_tasks(comparison),
        "interference": tables.interference(comparison, joint)
        if (joint := comparison.joint)
        else None,
        "metrics": tables.all_metrics(comparison, _headline(inputs)),
        "routing": tables.routed_systems(comparison),
        "unseen": tables.unseen_tasks(inputs.novelties),
        "worded": list(worded),
        "wordings": tables.by_setting(worded, inputs.timings, routed="routing accuracy"),
        "multi_question": tables.by_setting(
            _several(inputs), inputs.timings, routed="right adapter at the end"
        ),
        "routers": tables.router_quality(inputs.routers),
        "findings": tables.data_findings(inputs.findings, inputs.trainings),
        "problems": {
            task: list(map(str, found.problems[:5]))
            for task, found in inputs.findings.items()
            if found.problems
        },
        "stages": tables.stage_costs(inputs.timings),
        "total_seconds": sum(timing.seconds for timing in inputs.timings),
        "samples": comparison.samples,
        "machine": inputs.machine,
    }
