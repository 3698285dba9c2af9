"""The figures of a report, as charts that become SVG without a browser."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from dlplora.records.comparison import Comparison, Routing
from dlplora.records.training import AdapterTraining
from dlplora.report.inputs import Timing

INK, MUTED, LINE = "#1f2933", "#66727f", "#d9dee4"
ACCENT, SECOND, GREY = "#2457c5", "#d9822b", "#9aa5b1"
_FONT = "Inter, Helvetica Neue, Arial, sans-serif"
_WIDTH = 640
_ROW = 26


def to_svg(chart: Any) -> str:
    """Draw a chart as SVG text."""
    svg: str = vl_convert.vegalite_to_svg(_styled(chart).to_dict())
    return svg


def _styled(chart: Any) -> Any:
    axis = {
        "labelColor": INK,
        "titleColor": MUTED,
        "gridColor": "#eef1f4",
        "domainColor": LINE,
        "tickColor": LINE,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 240,
        "labelPadding": 9,
    }
    return (
        chart.configure(font=_FONT, background="white")
        .configure_axis(**axis)
        .configure_view(stroke=None)
        .configure_legend(labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
        .configure_header(labelFontSize=12, labelColor=INK, titleFontSize=12, labelFontWeight=600)
    )


def scores_by_system(comparison: Comparison) -> Any:
    """Draw each system's score with its interval, best on top."""
    rows = pd.DataFrame(
        {
            "system": name,
            "score": summary.score,
            "low": summary.score_low,
            "high": summary.score_high,
            "label": f"{summary.score:.3f}",
            "kind": "default" if name == comparison.default else "system",
        }
        for name, summary in comparison.summaries.items()
    )
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=["default", "system"], range=[SECOND, ACCENT]),
        legend=None,
    )
    y = alt.Y("system:N", sort=alt.SortField("score", order="descending"), title=None)
    x = alt.X("low:Q", title="score, mean over tasks", scale=alt.Scale(domain=[0, 1]))
    base = alt.Chart(rows)
    bars = base.mark_rule(strokeWidth=3, opacity=0.45).encode(x=x, x2="high:Q", y=y, color=colour)
    dots = base.mark_circle(size=110, opacity=1).encode(x="score:Q", y=y, color=colour)
    text = base.mark_text(align="left", dx=8, fontSize=12, color=INK).encode(
        x="high:Q", y=y, text="label:N"
    )
    return (bars + dots + text).properties(width=_WIDTH, height=_ROW * len(rows))


def scores_by_setting(comparisons: Mapping[str, Comparison]) -> Any:
    """Draw each system's score in each setting with its interval, best of the last on top.

    Systems of the last setting are shown.
    """
    rows = pd.DataFrame(
        {
            "setting": setting,
            "system": name,
            "score": summary.score,
            "low": summary.score_low,
            "high": summary.score_high,
        }
        for setting, comparison in comparisons.items()
        for name, summary in comparison.summaries.items()
    )
    last = rows[rows["setting"] == list(comparisons)[-1]].sort_values("score", ascending=False)
    systems = list(last["system"])
    rows = rows[rows["system"].isin(systems)]
    colours = [GREY, SECOND, ACCENT][-len(comparisons) :]
    colour = alt.Color(
        "setting:N",
        scale=alt.Scale(domain=list(comparisons), range=colours),
        title=None,
        legend=alt.Legend(orient="top", symbolOpacity=1),
    )
    y = alt.Y("system:N", sort=systems, title=None)
    offset = alt.YOffset("setting:N", sort=list(comparisons))
    x = alt.X("low:Q", title="score, mean over tasks", scale=alt.Scale(domain=[0, 1]))
    base = alt.Chart(rows)
    bars = base.mark_rule(strokeWidth=3, opacity=0.35).encode(
        x=x, x2="high:Q", y=y, yOffset=offset, color=colour
    )
    dots = base.mark_circle(size=80, opacity=1).encode(
        x="score:Q", y=y, yOffset=offset, color=colour
    )
    height = (14 * len(comparisons) + 8) * len(systems)
    return (bars + dots).properties(width=_WIDTH, height=height)


def scores_by_position(comparisons: Mapping[str, Comparison]) -> Any:
    """Draw each system's score on the first, second, … questions of prompts, a panel a setting."""
    rows = pd.DataFrame(
        {
            "setting": setting,
            "system": name,
            "question": str(place),
            "score": row.score,
            "low": row.low,
            "high": row.high,
        }
        for setting, comparison in comparisons.items()
        for name, positions in comparison.positions.items()
        for place, row in enumerate(positions, start=1)
    )
    order = list(rows.groupby("system")["score"].mean().sort_values(ascending=False).index)
    colours = [ACCENT, SECOND, "#3a9c74", "#9b59b6", GREY, INK]
    colour = alt.Color(
        "system:N",
        sort=order,
        scale=alt.Scale(domain=order, range=[colours[k % 6] for k in range(len(order))]),
        title=None,
        legend=alt.Legend(orient="top", symbolOpacity=1),
    )
    offset = alt.XOffset("system:N", sort=order)
    x = alt.X("question:O", title="question of the prompt", axis=alt.Axis(labelAngle=0))
    y = alt.Y("low:Q", title="score, mean over tasks", scale=alt.Scale(domain=[0, 1]))
    base = alt.Chart(rows)
    bars = base.mark_rule(strokeWidth=3, opacity=0.35).encode(
        x=x, xOffset=offset, y=y, y2="high:Q", color=colour
    )
    dots = base.mark_circle(size=70, opacity=1).encode(
        x=x, xOffset=offset, y="score:Q", color=colour
    )
    panel = (bars + dots).properties(width=alt.Step(13), height=220)
    return panel.facet(
        column=alt.Facet("setting:N", title=None, sort=list(comparisons))
    ).resolve_scale(x="independent")


def scores_by_task(comparison: Comparison, shown: Sequence[str]) -> Any:
    """Draw the systems of `shown` on each task, joined by a line from worst to best."""
    rows = pd.DataFrame(
        {"task": task, "system": name, "score": score.score}
        for name in shown
        for task, score in comparison.summaries[name].tasks.items()
    )
    y = alt.Y("task:N", title=None)
    colours = [GREY, SECOND, ACCENT][-len(shown) :]
    colour = alt.Color("system:N", scale=alt.Scale(domain=list(shown), range=colours), title=None)
    shape = alt.Shape(
        "system:N",
        scale=alt.Scale(domain=list(shown), range=["circle", "diamond", "cross"][-len(shown) :]),
        title=None,
    )
    offset = alt.YOffset("system:N", sort=list(shown))  # equal scores would hide one another
    span = (
        alt.Chart(rows)
        .mark_rule(color=LINE, strokeWidth=2)
        .encode(x=alt.X("min(score):Q", title="score"), x2="max(score):Q", y=y)
    )
    marks = (
        alt.Chart(rows)
        .mark_point(filled=True, opacity=1)
        .encode(
            x=alt.X("score:Q", scale=alt.Scale(domain=[0, 1])),
            y=y,
            color=colour,
            shape=shape,
            yOffset=offset,
        )
    )
    height = (_ROW + 10) * rows["task"].nunique()
    return (span + marks).properties(width=_WIDTH, height=height)


def interference(comparison: Comparison, shown: Sequence[str]) -> Any:
    """Draw on each task what the systems of `shown` gain or lose against the reference.

    Bars are paired 95 % intervals; where the tasks of a system lie on both sides, tasks trained
    together interfere.
    """
    rows = pd.DataFrame(
        {
            "task": task,
            "system": name,
            "difference": row.difference,
            "low": row.low,
            "high": row.high,
            "label": f"{row.difference:+.3f}",
        }
        for name in shown
        for task, row in comparison.task_differences[name].items()
    )
    y = alt.Y("task:N", title=None)
    offset = alt.YOffset("system:N", sort=list(shown))
    colour = alt.Color(
        "system:N",
        scale=alt.Scale(domain=list(shown), range=[ACCENT, SECOND, GREY, INK, MUTED][: len(shown)]),
        title=None,
        legend=alt.Legend(orient="top", symbolOpacity=1),
    )
    room = [min(rows["low"].min(), -0.1) - 0.02, max(rows["high"].max(), 0.1) + 0.1]  # for labels
    x = alt.X(
        "low:Q",
        title=f"difference from {comparison.reference}",
        scale=alt.Scale(domain=room, nice=False),
        axis=alt.Axis(format="+.1f", tickCount=8),
    )
    base = alt.Chart(rows)
    zero = alt.Chart().mark_rule(color=MUTED, strokeWidth=1.5).encode(x=alt.datum(0))
    bars = base.mark_rule(strokeWidth=3, opacity=0.35).encode(
        x=x, x2="high:Q", y=y, yOffset=offset, color=colour
    )
    dots = base.mark_circle(size=80, opacity=1).encode(
        x="difference:Q", y=y, yOffset=offset, color=colour
    )
    text = base.mark_text(align="right", fontSize=11, color=INK).encode(
        x=alt.datum(room[1]), y=y, yOffset=offset, text="label:N"
    )
    height = (16 * len(shown) + 10) * rows["task"].nunique()
    return (zero + bars + dots + text).properties(width=_WIDTH, height=height)


def learning_curves(trainings: Mapping[str, AdapterTraining]) -> Any:
    """Draw the training and validation loss of each adapter in a small panel of its own."""
    rows = pd.DataFrame(
        {"task": task, "step": point.step, "loss": loss, "on": on}
        for task, training in trainings.items()
        for point in training.curve.points
        for on, loss in (("training", point.loss), ("validation", point.validation_loss))
        if loss is not None
    )
    colour = alt.Color(
        "on:N",
        scale=alt.Scale(domain=["training", "validation"], range=[GREY, ACCENT]),
        title=None,
        legend=alt.Legend(orient="top"),
    )
    x = alt.X("step:Q", title="step")
    y = alt.Y("loss:Q", title="loss of answer tokens", scale=alt.Scale(domainMin=0))
    base = alt.Chart(rows).encode(x=x, y=y, color=colour)
    lines = base.mark_line(strokeWidth=1.6)
    points = base.transform_filter("datum.on == 'validation'").mark_circle(size=45, opacity=1)
    panel = (lines + points).properties(width=190, height=120)
    return panel.facet(
        facet=alt.Facet("task:N", title=None, header=alt.Header(labelAnchor="start")), columns=3
    ).resolve_scale(y="independent")


def confusion_matrix(routing: Routing) -> Any:
    """Draw how many items of each task (rows) were first sent to each adapter (columns)."""
    names = sorted({*routing.confusion, *(a for row in routing.confusion.values() for a in row)})
    rows = pd.DataFrame(
        {
            "task": task,
            "adapter": adapter,
            "items": row.get(adapter, 0),
            "share": row.get(adapter, 0) / sum(row.values()),
            "label": str(row.get(adapter, 0) or ""),
        }
        for task, row in routing.confusion.items()
        for adapter in names
    )
    base = alt.Chart(rows).encode(
        x=alt.X("adapter:N", title="first adapter", axis=alt.Axis(labelAngle=-40), sort=names),
        y=alt.Y("task:N", title="true task", sort=names),
    )
    cells = base.mark_rect(stroke="white", strokeWidth=2).encode(
        color=alt.Color(
            "share:Q", scale=alt.Scale(domain=[0, 1], range=["#f3f5f8", ACCENT]), legend=None
        )
    )
    text = base.mark_text(fontSize=12).encode(
        text="label:N",
        color=alt.condition("datum.share > 0.5", alt.value("white"), alt.value(INK)),
    )
    size = 44 * len(names)
    return (cells + text).properties(width=size, height=_ROW * len(routing.confusion) + 10)


def adapters_per_prompt(routing: Mapping[str, Routing]) -> Any:
    """Draw for each system how many prompts were answered by 0, 1, 2, … adapters."""
    rows = pd.DataFrame(
        {"system": name, "adapters": int(size), "prompts": count}
        for name, row in routing.items()
        for size, count in row.num_adapters.items()
    )
    most = int(rows["adapters"].max())
    bars = (
        alt.Chart(rows)
        .mark_bar()
        .encode(
            x=alt.X("prompts:Q", title="prompts", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("system:N", title=None, sort=list(routing)),
            order=alt.Order("adapters:Q"),
            color=alt.Color(
                "adapters:O",
                title="adapters in a prompt",
                scale=alt.Scale(domain=list(range(most + 1)), range=_shades(most + 1)),
            ),
        )
    )
    return bars.properties(width=_WIDTH - 60, height=_ROW * len(routing))


def _shades(count: int) -> list[str]:
    """Return colours from pale to dark blue, the second one the accent."""
    known = ["#dfe5ee", "#8fb0ef", ACCENT, "#173a86", "#0c1f49"]
    return [known[min(place, len(known) - 1)] for place in range(count)]


def stage_seconds(timings: Sequence[Timing]) -> Any:
    """Draw the seconds of each stage, the runs of one stage stacked."""
    rows = pd.DataFrame(
        {"stage": row.stage, "item": row.item, "seconds": row.seconds} for row in timings
    )
    order = rows.groupby("stage")["seconds"].sum().sort_values(ascending=False).index.tolist()
    bars = (
        alt.Chart(rows)
        .mark_bar(color=ACCENT, stroke="white", strokeWidth=1)
        .encode(
            x=alt.X("seconds:Q", title="seconds, one box a run of the stage"),
            y=alt.Y("stage:N", title=None, sort=order),
            detail="item:N",
        )
    )
    return bars.properties(width=_WIDTH, height=_ROW * len(order))
