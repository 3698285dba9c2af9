"""A run on a page: its stages, losses and log, with buttons to cancel and resume it.

Its id stands in the address of the page, so that a reload, or another browser, finds it again.
"""

import re
from collections.abc import Sequence
from typing import Any

import gradio as gr
import pandas as pd
from markupsafe import Markup

from dlplora.app.commands import shown
from dlplora.app.context import Context
from dlplora.app.guard import Changes, guarded
from dlplora.app.html import bar, link, log, said, seconds, table
from dlplora.app.notice import Notice, html
from dlplora.app.runs import Run, StageRun
from dlplora.app.settings import apply

_SECONDS = 2.0  # between two looks at a run
_LINES = 400
_STEP = re.compile(
    r"\b(?:adapter|experts|joint|router) (\S+): (\d+)/\d+, .*?\bloss (\d[\d.,]*(?:e[+-]?\d+)?)"
)
_FROM_ADDRESS = "() => new URLSearchParams(window.location.search).get('run') || ''"
_TO_ADDRESS = """(id) => {
    const url = new URL(window.location);
    if (id) url.searchParams.set('run', id); else url.searchParams.delete('run');
    window.history.replaceState(null, '', url);
    return id;
}"""
_NONE = said("No run selected. Start one above, or choose one from the list on Runs.")


class RunPanel:
    """The part of a page that follows one run.

    `ended` holds a new value when the run that is watched has ended: a page may refresh what it
    shows by `ended.change`.
    """

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        self._runs, self._commands = context.runs, context.commands
        self.id = gr.Textbox(visible="hidden")
        self.ended = gr.Textbox(visible="hidden")
        self._line = html()
        self._summary = html(_NONE)
        self._losses = gr.LinePlot(
            x="step", y="loss", color="task", title="Loss", height=240, visible=False
        )
        with gr.Row():
            self._cancel = gr.Button("Cancel", variant="stop", size="sm", visible=False)
            self._resume = gr.Button("Resume", size="sm", visible=False)
        with gr.Accordion("Log", open=False, visible=False) as self._log_part:
            self._log = html()
        self._timer = gr.Timer(_SECONDS)
        self._connect(demo)

    def start(
        self,
        notice: Notice,
        *targets: str,
        values: Sequence[str] = (),
        told: str = "The run has started.",
    ) -> Changes:
        """Set values of params.yaml, bring stages up to date in a run, all if none, and follow it.

        `told` is what the notice then says, beside the commands that do the same.
        """
        done = apply(self._commands, values)
        parameters = {"targets": list(targets)} if targets else {}
        run = self._runs.start("pipeline/this-tree", parameters)
        command = "\n".join([*done, shown("repro", *targets)])
        return {**notice.good(told, command), self.id: run}

    def _connect(self, demo: gr.Blocks) -> None:
        buttons = [self._cancel, self._resume]
        parts = [self._line, self._summary, self._losses, *buttons, self._log_part, self._log]
        shown: list[Any] = [*parts, self.ended, self._timer]
        look = guarded(self._look, self._summary)  # the next look replaces an error
        demo.load(look, self.id, shown, js=_FROM_ADDRESS, show_progress="hidden")
        demo.load(None, None, self.id, js=_FROM_ADDRESS)
        self.id.change(None, self.id, self.id, js=_TO_ADDRESS)
        self.id.change(look, self.id, shown, show_progress="hidden")
        followed = [self._timer, self._line]
        self.id.change(_followed, self.id, followed, show_progress="hidden")
        self._timer.tick(look, self.id, shown, show_progress="hidden")
        for button, act in ((self._cancel, self._end), (self._resume, self._start_again)):
            button.click(guarded(act, self._line), self.id, [self._line, self.id])

    def _end(self, run_id: str) -> Changes:
        self._runs.cancel(run_id)
        return {self._line: said("The run is being cancelled; it may take some seconds.")}

    def _start_again(self, run_id: str) -> Changes:
        return {self.id: self._runs.start_again(run_id)}

    def _look(self, run_id: str) -> Changes:
        """Show a run as it is now; the timer stops once it is over."""
        if not run_id:
            parts = (self._losses, self._cancel, self._resume, self._log_part)
            hidden = {part: gr.update(visible=False) for part in parts}
            return {self._summary: _NONE, self._timer: gr.Timer(active=False), **hidden}
        run = self._runs.read(run_id)
        stages, lines = self._runs.stages(run_id), self._runs.lines(run_id, last=_LINES)
        losses = losses_in(lines)
        changes: dict[Any, Any] = {
            self._summary: summary_of(run, stages, page=self._runs.page(run_id)),
            self._losses: gr.LinePlot(losses, visible=len(losses) > 1),
            self._cancel: gr.update(visible=not run.is_over),
            self._resume: gr.update(visible=run.is_over),
            self._log_part: gr.update(visible=bool(lines)),
            self._log: log(lines),
            self._timer: gr.Timer(active=not run.is_over),
        }
        over = {self._line: "", self.ended: f"{run_id} {run.state}"}
        return changes | (over if run.is_over else {})


def _followed(run_id: str) -> tuple[gr.Timer, str]:
    """Begin to look at another run."""
    return gr.Timer(active=bool(run_id)), ""


def summary_of(run: Run, stages: Sequence[StageRun], *, page: str) -> Markup:
    """Tell how a run stands, stage by stage."""
    taken = "" if run.seconds is None else f", {seconds(run.seconds)}"
    head = Markup('<p class="state {}" role="status"><strong>{}</strong> {}{}. {} {}</p>').format(
        run.state.lower(), run.state, run.name, taken, run.message, link("Prefect's page", page)
    )
    rows = [
        [
            stage.name,
            stage.state,
            seconds(stage.seconds),
            bar(stage.percent, stage.told)
            if stage.percent is not None and stage.state == "Running"
            else stage.message,
        ]
        for stage in stages
    ]
    empty = "No stage began." if run.is_over else "It begins once a place is free."
    return head + table(
        ["stage", "state", "time", "progress"], rows, title="Stages of the run", empty=empty
    )


def losses_in(lines: Sequence[str]) -> pd.DataFrame:
    """Return the losses that progress lines in a log tell, by task and step."""
    found = [match for line in lines if (match := _STEP.search(line))]
    rows = [(one[1], int(one[2]), float(one[3].replace(",", ""))) for one in found]
    return pd.DataFrame(rows, columns=["task", "step", "loss"])
