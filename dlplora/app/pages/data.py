"""The page Data: files checked, tasks added, router data drawn, prompts of several questions."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.commands import shown, typed_path
from dlplora.app.context import Context
from dlplora.app.html import table
from dlplora.app.notice import Changes, Notice, header, html
from dlplora.app.run_panel import RunPanel
from dlplora.data.balance import read_labelled
from dlplora.data.raw import FORMATS
from dlplora.errors import DataError
from dlplora.lifecycle.inbox import INBOX
from dlplora.params.fields import is_identifier
from dlplora.params.load import load_params
from dlplora.project.files import RAW
from dlplora.records.files import atomic_write
from dlplora.records.findings import read_findings

_MOST_ROWS = 200
_SAMPLES = 3
_FOLDERS = (RAW, INBOX, Path("suites"), Path("data/fetched"))


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
                self._add(demo)
            with gr.Tab("Tasks and inbox"):
                self._list(demo)
            with gr.Tab("Router data"):
                self._balance(demo)
            with gr.Tab("Several questions"):
                self._prompts()

    def _add(self, demo: gr.Blocks) -> None:
        with gr.Row():
            self._upload = gr.File(
                label=f"File of questions and answers ({', '.join(FORMATS)})",
                file_types=list(FORMATS),
                height=140,
            )
            with gr.Column():
                self._chosen = gr.Dropdown([""], label="… or a file of the project", value="")
                self._name = gr.Textbox(
                    label="Name of the task", placeholder="capitals", max_length=64
                )
        with gr.Accordion("Other wordings, bad items", open=False):
            self._wordings = gr.File(
                label="Other wordings of the questions (YAML with train, validation and test)",
                file_types=[".yaml", ".yml"],
                height=120,
            )
            self._skip = gr.Checkbox(label="Leave bad items out instead of refusing the file")
        with gr.Row():
            check = gr.Button("Check")
            add = gr.Button("Add task", variant="primary")
            inbox = gr.Button("Put into the inbox")
        self._notice = notice = Notice(shown("add-task", "capitals", "capitals.json"))
        file = [self._upload, self._chosen]
        demo.load(lambda: gr.Dropdown(["", *self._files()]), None, self._chosen)
        gr.on(
            [self._upload.upload, self._chosen.input], _name_of, file, self._name,
            show_progress="hidden",
        )  # fmt: skip
        check.click(notice.guarded(self._check), file, notice.outputs)
        inputs = [*file, self._name, self._wordings, self._skip]
        add.click(notice.guarded(self._add_task), inputs, notice.outputs)
        inbox.click(notice.guarded(self._put), [*file, self._name], notice.outputs)

    def _check(self, upload: str | None, chosen: str) -> Changes:
        file = self._file(upload, chosen)
        told = self._context.commands.json("validate", str(file))
        command = shown("validate", typed_path(file, self._context.root))
        if told["unreadable"]:
            raise DataError(_short(next(iter(told["unreadable"].values())), file))
        found = next(iter(told["files"].values()))
        problems, whole = found["problems"], found["whole"]
        rows = [[f"{one['unit']} {one['item']}", one["problem"]] for one in problems[:_MOST_ROWS]]
        more = len(problems) - len(rows)
        notes = [*found["notes"], *([f"{more} more bad items are not shown"] if more else [])]
        if not problems and whole is None:
            changes = self._notice.good(f"{file.name} is good: a task can be made of it", command)
        else:
            changes = self._notice.bad(
                whole or f"{len(problems)} items of {file.name} are bad", command
            )
        listed = table(["item", "what is wrong"], rows, title="Findings", empty="")
        return {**changes, self._notice.found: listed + Markup("<br>").join(notes)}

    def _add_task(
        self, upload: str | None, chosen: str, name: str, wordings: str | None, skip: bool
    ) -> Changes:
        file = self._file(upload, chosen)
        more = ["--wordings", wordings] if wordings else []
        more += ["--skip-bad-rows"] if skip else []
        told = self._context.commands.edit("add-task", _checked(name), str(file), *more)
        path = typed_path(file, self._context.root)
        command = f"{shown('add-task', name, path, *more)}\n{shown('repro')}"
        return {
            **self._notice.good(
                f"{told.splitlines()[-1]}. Train its adapter on Adapters.", command
            ),
            self._notice.found: "",
        }

    def _put(self, upload: str | None, chosen: str, name: str) -> Changes:
        file = self._file(upload, chosen)
        target = self._context.root / INBOX / f"{_checked(name)}{file.suffix.lower()}"
        if target.exists():
            raise DataError(f"{INBOX / target.name} is there already; wait until it is taken")
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as aside:
            shutil.copyfile(file, aside)
        where = str(INBOX / target.name)
        command = f"cp {file.name} {where}\n{shown('inbox')}"
        return self._notice.good(f"{where} is there; a retrain takes it in (Models)", command)

    def _file(self, upload: str | None, chosen: str) -> Path:
        """Return the file that was uploaded, or one of those listed."""
        if upload:
            return Path(upload)
        if chosen not in self._files():
            raise DataError("no file: upload one, or choose one of the project")
        return self._context.root / chosen

    def _files(self) -> list[str]:
        root = self._context.root
        found = (file for folder in _FOLDERS for file in sorted((root / folder).rglob("*")))
        return [
            str(file.relative_to(root))
            for file in found
            if file.suffix in FORMATS and file.is_file() and "refused" not in file.parts
        ]

    def _list(self, demo: gr.Blocks) -> None:
        self._tasks = html()
        with gr.Row():
            self._gone = gr.Dropdown([], label="Remove a task")
            remove = gr.Button("Remove", variant="stop")
        gr.Markdown("### Inbox\nFiles that a retrain takes in, or would refuse.")
        self._inbox = html()
        look = gr.Button("Look again")
        self._listed = notice = Notice(shown("inbox"))
        parts = [*notice.outputs, self._tasks, self._gone, self._inbox]
        demo.load(notice.guarded(self._look), None, parts)
        look.click(notice.guarded(self._look), None, parts)
        remove.click(notice.guarded(self._remove), self._gone, parts)

    def _look(self) -> Changes:
        params = load_params(self._context.project.params_file)
        rows = [[name, *self._sizes(name), task.primary] for name, task in params.tasks.items()]
        heads = ["task", "training", "validation", "test", "bad items", "metric"]
        arrivals = [
            [
                row["file"],
                "a new task" if row["is_new_task"] else f"for {row['task']}",
                row["num_rows"],
                row["num_new"],
                row["problem"] or "good",
            ]
            for row in self._context.commands.json("inbox")
        ]
        return {
            self._tasks: table(heads, rows, title="Tasks", empty="Add a task first."),
            self._gone: gr.Dropdown(list(params.tasks), value=None),
            self._inbox: table(
                ["file", "brings", "rows", "new questions", "finding"], arrivals, title="Inbox",
                empty="The inbox is empty. “Put into the inbox” on “Add a task” fills it.",
            ),
        }  # fmt: skip

    def _sizes(self, task: str) -> list[Any]:
        file = self._context.root / "data/findings" / f"{task}.json"
        if not file.exists():
            return ["not read yet", None, None, None]
        found = read_findings(file)
        return [*(size.kept for size in found.splits.values()), found.skipped]

    def _remove(self, name: str | None) -> Changes:
        if not name:
            raise DataError("choose the task to remove")
        self._context.commands.edit("remove-task", name)
        command = shown("remove-task", name)
        done = self._listed.good(f"{name} is removed; its files stay in {RAW / name}", command)
        return {**self._look(), **done}

    def _balance(self, demo: gr.Blocks) -> None:
        gr.Markdown("The same number of questions of every task, some of them in other wordings.")
        balance = load_params(self._context.project.params_file).balance
        with gr.Row():
            count = gr.Number(balance.per_task, label="Questions a task", precision=0, minimum=1)
            share = gr.Slider(0, 1, balance.reworded, step=0.05, label="Share in other wordings")
        draw = gr.Button("Draw router data", variant="primary")
        self._drawing = notice = Notice(shown("repro", "router_data"))
        panel = self._panel = RunPanel(self._context, demo)
        self._drawn = html()
        draw.click(notice.guarded(self._draw), [count, share], [*notice.outputs, panel.id])
        demo.load(self._show_drawn, None, self._drawn, show_progress="hidden")
        panel.ended.change(self._show_drawn, None, self._drawn, show_progress="hidden")

    def _draw(self, count: float, share: float) -> Changes:
        values = [f"balance.per_task={int(count)}", f"balance.reworded={share:g}"]
        self._context.commands.edit("set", *values)
        run = self._context.runs.start("pipeline/this-tree", {"targets": ["router_data"]})
        command = f"{shown('set', *values)}\n{shown('repro', 'router_data')}"
        return {**self._drawing.good("The run has started.", command), self._panel.id: run}

    def _show_drawn(self) -> Markup:
        file = self._context.root / "data/router_data/train.parquet"
        rows = read_labelled(file) if file.exists() else []
        counts = Counter(row.task for row in rows)
        shown_rows = [
            [task, count, *[row.text for row in rows if row.task == task][:_SAMPLES]]
            for task, count in sorted(counts.items())
        ]
        heads = ["task", "questions", *["for example"] * _SAMPLES]
        return table(heads, shown_rows, title="Router data", empty="No router data is drawn yet.")

    def _prompts(self) -> None:
        gr.Markdown(
            "Prompts of several questions, each of another task, as systems are evaluated on them."
        )
        with gr.Row():
            number = gr.Radio([2, 3, 5], value=2, label="Questions in a prompt")
            show = gr.Button("Preview")
        self._previewed = notice = Notice(shown("prompts", "--questions", "2"))
        show.click(notice.guarded(self._draw_prompts), number, notice.outputs)

    def _draw_prompts(self, number: int) -> Changes:
        words = ["prompts", "--questions", str(number)]
        rows = [
            [", ".join(row["tasks"]), Markup('<pre class="prompt">{}</pre>').format(row["prompt"])]
            for row in self._context.commands.json(*words)
        ]
        return {
            **self._previewed.good(f"{len(rows)} prompts.", shown(*words)),
            self._previewed.found: table(
                ["tasks", "prompt"], rows, title="Prompts", empty="None fits."
            ),
        }


def _short(text: str, file: Path) -> str:
    """Name a file as its owner does, without the folder of uploads."""
    return text.replace(str(file), file.name)


def _checked(name: str) -> str:
    if not is_identifier(name):
        raise DataError(
            f"{name!r} cannot name a task: use a letter, then up to 63 letters, digits or _"
        )
    return name


def _name_of(upload: str | None, chosen: str) -> str:
    """Propose the name of a file as that of its task."""
    return Path(upload or chosen or "").stem
