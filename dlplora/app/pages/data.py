"""The page Data: files checked, tasks added, router data drawn, prompts of several questions."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.commands import shown, task_name
from dlplora.app.context import Context
from dlplora.app.guard import Changes, drawn, guarded
from dlplora.app.html import table
from dlplora.app.notice import Notice, header, html
from dlplora.app.pages.add_task import add_tab
from dlplora.app.run_panel import RunPanel
from dlplora.app.settings import BALANCE, field, typed
from dlplora.data.balance import read_labelled
from dlplora.errors import DataError
from dlplora.params.load import load_params
from dlplora.project.files import RAW
from dlplora.records.findings import read_findings

_SAMPLES = 3


class DataPage:
    """From files of questions and answers to tasks and router data."""

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        self._context = context
        header(
            "Data",
            "Files of questions and answers become tasks. Each task has an adapter of its own; "
            "the routers learn from the questions of all.",
        )
        with gr.Tabs():
            with gr.Tab("Add a task"):
                add_tab(context, demo)
            with gr.Tab("Tasks and inbox"):
                self._list(demo)
            with gr.Tab("Router data"):
                draw, fields = self._balance()
            with gr.Tab("Several questions"):
                self._prompts()
        self._panel = panel = RunPanel(context, demo)
        notice, show = self._drawing, drawn(self._show_drawn)
        draw.click(notice.guarded(self._draw), fields, [*notice.outputs, panel.id])
        demo.load(show, None, self._drawn, show_progress="hidden")
        now = guarded(lambda: self._now(fields), notice.line)
        demo.load(now, None, [*fields, notice.line], show_progress="hidden")
        panel.ended.change(show, None, self._drawn, show_progress="hidden")

    def _list(self, demo: gr.Blocks) -> None:
        self._tasks = html()
        with gr.Row():
            self._gone = gr.Dropdown([], label="Remove a task")
            remove = gr.Button("Remove", variant="stop")
        gr.Markdown("### Inbox\nFiles that a retrain takes in, or would refuse.")
        self._inbox = html()
        refresh = gr.Button("Refresh")
        self._listed = notice = Notice(shown("inbox"))
        parts = [*notice.outputs, self._tasks, self._gone, self._inbox]
        look = notice.guarded(self._look)
        demo.load(look, None, parts, show_progress="hidden")
        refresh.click(look, None, parts)
        remove.click(notice.guarded(self._remove), self._gone, parts)

    def _look(self) -> Changes:
        tasks = load_params(self._context.project.params_file).tasks
        rows = [[name, *self._sizes(name), task.primary] for name, task in tasks.items()]
        heads = ["task", "training", "validation", "test", "bad items", "metric"]
        arrivals = [_arrival(row) for row in self._context.commands.json("inbox")]
        return {
            self._tasks: table(heads, rows, title="Tasks", empty="Add a task first."),
            self._gone: gr.Dropdown(list(tasks), value=None),
            self._inbox: table(
                ["file", "brings", "rows", "new questions", "finding"],
                arrivals,
                title="Inbox",
                empty="The inbox is empty. “Put into the inbox” on “Add a task” fills it.",
            ),
        }

    def _sizes(self, task: str) -> list[Any]:
        file = self._context.root / "data/findings" / f"{task}.json"
        if not file.exists():
            return ["not read yet", None, None, None]
        found = read_findings(file)
        return [*(size.kept for size in found.splits.values()), found.skipped]

    def _remove(self, name: str | None) -> Changes:
        if not name:
            raise DataError("choose the task to remove")
        self._context.commands.edit("remove-task", task_name(name))
        told = f"{name} is removed; files of your own stay in {RAW / name}"
        return {**self._look(), **self._listed.good(told, shown("remove-task", name))}

    def _balance(self) -> tuple[gr.Button, list[gr.Textbox]]:
        gr.Markdown(
            "The same number of questions of every task, some of them in other wordings. "
            "A field that is left empty keeps its value."
        )
        with gr.Row():
            fields = [field(label) for label in BALANCE.values()]
        draw = gr.Button("Draw router data", variant="primary")
        self._drawing = Notice(shown("repro", "router_data"))
        self._drawn = html()
        return draw, fields

    def _now(self, fields: Sequence[gr.Textbox]) -> Changes:
        """Show the present values."""
        balance = load_params(self._context.project.params_file).balance
        named = zip(fields, BALANCE, strict=True)
        return {one: gr.Textbox(placeholder=str(getattr(balance, key))) for one, key in named}

    def _draw(self, *values: str) -> Changes:
        paths = (f"balance.{key}" for key in BALANCE)
        given = typed(dict(zip(paths, values, strict=True)))
        return self._panel.start(self._drawing, "router_data", values=given)

    def _show_drawn(self) -> Markup:
        file = self._context.root / "data/router_data/train.parquet"
        by_task: dict[str, list[str]] = {}
        for row in read_labelled(file) if file.exists() else []:
            by_task.setdefault(row.task, []).append(row.text)
        rows = [[task, len(texts), *texts[:_SAMPLES]] for task, texts in sorted(by_task.items())]
        heads = ["task", "questions", *["for example"] * _SAMPLES]
        return table(heads, rows, title="Router data", empty="No router data is drawn yet.")

    def _prompts(self) -> None:
        gr.Markdown(
            "Prompts of several questions, each of another task, as systems are evaluated on them."
        )
        with gr.Row():
            number = gr.Radio([2, 3, 5], value=2, label="Questions in a prompt")
            show = gr.Button("Preview")
        self._previewed = notice = Notice(shown("prompts", "--questions", "2"))
        show.click(notice.guarded(self._preview), number, notice.outputs)

    def _preview(self, number: int) -> Changes:
        words = ("prompts", "--questions", str(number))
        rows = [
            [", ".join(row["tasks"]), Markup('<pre class="prompt">{}</pre>').format(row["prompt"])]
            for row in self._context.commands.json(*words)
        ]
        return {
            **self._previewed.good(f"{len(rows)} prompts.", shown(*words)),
            self._previewed.found: table(["tasks", "prompt"], rows, title="Prompts", empty=""),
        }


def _arrival(row: Mapping[str, Any]) -> list[Any]:
    """Tell what a file of the inbox would bring."""
    brings = "a new task" if row["is_new_task"] else f"for {row['task']}"
    return [row["file"], brings, row["num_rows"], row["num_new"], row["problem"] or "good"]
