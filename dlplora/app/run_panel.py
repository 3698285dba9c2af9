"""A run on a page: its stages, losses and log while it goes on; cancelled, or gone on with.

Its id stands in the address of the page, so that a reload, or another browser, finds it again.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
import pandas as pd
from markupsafe import Markup

from dlplora.app.context import Context
from dlplora.app.html import bar, link, log, said, table
from dlplora.app.notice import Changes, html
from dlplora.app.runs import Run, StageRun
from dlplora.errors import DlpLoraError

_SECONDS = 2.0  # between two looks at a run
_LINES = 400
_STEP = re.compile(r"\b(?:adapter|experts|joint|router) (\S+): (\d+)/\d+, .*?\bloss ([\d.e+-]+)")
_FROM_ADDRESS = "() => new URLSearchParams(window.location.search).get('run') || ''"
_TO_ADDRESS = """(id) => {
    const url = new URL(window.location);
    if (id) url.searchParams.set('run', id); else url.searchParams.delete('run');
    window.history.replaceState(null, '', url);
    return id;
}"""
_NONE = said("No run is watched here. Start one above, or choose one on the page Runs.")


class RunPanel:
    """The part of a page that follows one run.

    `ended` holds a new value when the run that is watched has ended: a page may refresh what it
    shows by `ended.change`.
    """

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        self._runs = context.runs
        self.id = gr.Textbox(visible="hidden")
        self.ended = gr.Textbox(visible="hidden")
        self.summary = html(_NONE)
        self.losses = gr.LinePlot(
            x="step",
            y="loss",
            color="task",
            title="Loss of the training",
            height=240,
            visible=False,
        )
        with gr.Row(visible=False) as self.buttons:
            cancel = gr.Button("Cancel", variant="stop", size="sm")
            again = gr.Button("Go on", size="sm")
        with gr.Accordion("Log", open=False, visible=False) as self.log_part:
            self.log = html()
        timer = gr.Timer(_SECONDS)
        shown: list[Any] = [
            self.summary, self.losses, self.buttons, self.log_part, self.log, self.ended, timer,
        ]  # fmt: skip
        self._timer = timer
        demo.load(self._show, self.id, shown, js=_FROM_ADDRESS, show_progress="hidden")
        demo.load(None, None, self.id, js=_FROM_ADDRESS)
        self.id.change(None, self.id, self.id, js=_TO_ADDRESS)
        self.id.change(self._show, self.id, shown, show_progress="hidden")
        timer.tick(self._show, self.id, shown, show_progress="hidden")
        cancel.click(self._doing(self._cancel), self.id, [self.summary, self.id])
        again.click(self._doing(self._again), self.id, [self.summary, self.id])

    def _doing(self, act: Callable[[str], Changes]) -> Callable[[str], Changes]:
        def doing(run_id: str) -> Changes:
            try:
                return act(run_id)
            except DlpLoraError as error:
                return {self.summary: said(str(error), "error")}

        return doing

    def _cancel(self, run_id: str) -> Changes:
        self._runs.cancel(run_id)
        return {self.summary: said("The run is being cancelled …")}

    def _again(self, run_id: str) -> Changes:
        return {self.id: self._runs.start_again(run_id)}

    def _show(self, run_id: str) -> Changes:
        """Show a run as it is now; the timer stops once it is over."""
        if not run_id:
            hidden = gr.update(visible=False)
            return {
                self.summary: _NONE, self.losses: hidden, self.buttons: hidden,
                self.log_part: hidden, self._timer: gr.Timer(active=False),
            }  # fmt: skip
        try:
            run = self._runs.read(run_id)
            stages, lines = self._runs.stages(run_id), self._runs.lines(run_id, last=_LINES)
        except DlpLoraError as error:
            return {self.summary: said(str(error), "error"), self._timer: gr.Timer(active=True)}
        losses = losses_in(lines)
        return {
            self.summary: summary_of(run, stages, page=self._runs.page(run_id)),
            self.losses: gr.LinePlot(losses, visible=len(losses) > 1),
            self.buttons: gr.update(visible=True),
            self.log_part: gr.update(visible=bool(lines)),
            self.log: log(lines),
            self.ended: f"{run_id} {run.state}" if run.is_over else "",
            self._timer: gr.Timer(active=not run.is_over),
        }


def summary_of(run: Run, stages: Sequence[StageRun], *, page: str) -> Markup:
    """Tell how a run stands, stage by stage."""
    seconds = "" if run.seconds is None else f", {run.seconds:.0f} s"
    head = Markup('<p class="state {}" role="status"><strong>{}</strong> {}{}. {} {}</p>').format(
        run.state.lower(), run.state, run.name, seconds, run.message, link("Prefect's page", page)
    )
    rows = [
        [
            stage.name,
            stage.state,
            None if stage.seconds is None else f"{stage.seconds:.0f} s",
            bar(stage.percent, stage.told)
            if stage.percent is not None and stage.state == "Running"
            else stage.message,
        ]
        for stage in stages
    ]
    empty = "It begins once a place is free." if not run.is_over else "No stage began."
    return head + table(
        ["stage", "state", "time", "progress"], rows, title="Stages of the run", empty=empty
    )


def losses_in(lines: Sequence[str]) -> pd.DataFrame:
    """Return the losses that progress lines in a log tell, by task and step."""
    found = [match for line in lines if (match := _STEP.search(line))]
    return pd.DataFrame(
        [{"task": one[1], "step": int(one[2]), "loss": float(one[3])} for one in found],
        columns=["task", "step", "loss"],
    )
