"""The page Runs: what runs, what ran, and one of them in full."""

from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.commands import shown
from dlplora.app.context import Context
from dlplora.app.guard import Changes, drawn
from dlplora.app.html import link, local, seconds, table
from dlplora.app.notice import Notice, header, html
from dlplora.app.run_panel import RunPanel
from dlplora.app.runs import Run

_COUNT = 30
_SECONDS = 5.0


class RunsPage:
    """All runs, wherever they were started."""

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        self._context = context
        header(
            "Runs",
            "Runs continue when the browser closes. One that was cancelled or failed resumes where "
            "it was: what is done is not done again.",
        )
        update = gr.Button("Bring everything up to date", variant="primary")
        self._notice = notice = Notice(shown("repro"))
        self._panel = RunPanel(context, demo)
        gr.Markdown("## All runs")
        listed = html()
        look = drawn(self._look)
        demo.load(look, None, listed, show_progress="hidden")
        gr.Timer(_SECONDS).tick(look, None, listed, show_progress="hidden")
        update.click(notice.guarded(self._start), None, [*notice.outputs, self._panel.id])

    def _look(self) -> Markup:
        rows = [_row(run) for run in self._context.runs.recent(_COUNT)]
        heads = ["run", "of", "state", "began", "time", "result"]
        empty = "Nothing ran yet. “Bring everything up to date” starts the whole pipeline."
        return table(heads, rows, title="Runs", empty=empty)

    def _start(self) -> Changes:
        return self._panel.start(self._notice)


def _row(run: Run) -> list[Any]:
    targets = run.parameters.get("targets") or []
    return [
        link(run.name, f"runs?run={run.id}"),
        " ".join([run.deployment, *targets]),
        run.state,
        None if run.began is None else local(run.began),
        seconds(run.seconds),
        run.message,
    ]
