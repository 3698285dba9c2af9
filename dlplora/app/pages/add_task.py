"""A part of the page Data: a file is checked, added as a task, or put into the inbox."""

import shlex
import shutil
from pathlib import Path

import gradio as gr
from markupsafe import Markup

from dlplora.app.commands import shown, task_name, typed_path
from dlplora.app.context import Context
from dlplora.app.guard import Changes, guarded
from dlplora.app.html import table
from dlplora.app.notice import Notice
from dlplora.data.raw import FORMATS
from dlplora.errors import DataError
from dlplora.lifecycle.inbox import INBOX
from dlplora.project.files import RAW
from dlplora.records.files import atomic_write

_MOST_ROWS = 200
_FOLDERS = (RAW, INBOX, Path("suites"), Path("data/fetched"))


def add_tab(context: Context, demo: gr.Blocks) -> None:
    """Lay out the part."""
    with gr.Row():
        upload = gr.File(
            label=f"File of questions and answers ({', '.join(FORMATS)})",
            file_types=list(FORMATS),
            height=140,
        )
        with gr.Column():
            chosen = gr.Dropdown([""], label="… or a file of the project", value="")
            name = gr.Textbox(label="Name of the task", placeholder="capitals", max_length=64)
    with gr.Accordion("Other wordings, bad items", open=False):
        wordings = gr.File(
            label="Other wordings of the questions (YAML with train, validation and test)",
            file_types=[".yaml", ".yml"],
            height=120,
        )
        skip = gr.Checkbox(label="Leave bad items out instead of refusing the file")
    with gr.Row():
        check = gr.Button("Check")
        add = gr.Button("Add task", variant="primary")
        inbox = gr.Button("Put into the inbox")
    notice = Notice(shown("add-task", "capitals", "capitals.json"))
    adding = _Adding(context, notice)
    file = [upload, chosen]
    listed = guarded(lambda: {chosen: gr.Dropdown(["", *adding.files()])}, notice.line)
    demo.load(listed, None, [chosen, notice.line], show_progress="hidden")
    upload.upload(lambda file: ("", Path(file).stem), upload, [chosen, name])
    chosen.input(lambda file: (None, Path(file).stem), chosen, [upload, name])
    check.click(notice.guarded(adding.check), file, notice.outputs)
    inputs = [*file, name, wordings, skip]
    add.click(notice.guarded(adding.add), inputs, notice.outputs)
    inbox.click(notice.guarded(adding.put), [*file, name], notice.outputs)


class _Adding:
    """What the buttons do."""

    def __init__(self, context: Context, notice: Notice) -> None:
        self._context = context
        self._notice = notice

    def files(self) -> list[str]:
        """List the files of the project that tasks can be made of."""
        root = self._context.root
        found = (file for folder in _FOLDERS for file in sorted((root / folder).rglob("*")))
        return [
            str(file.relative_to(root))
            for file in found
            if file.suffix in FORMATS and file.is_file() and "refused" not in file.parts
        ]

    def check(self, upload: str | None, chosen: str) -> Changes:
        """Tell what is wrong with a file, item by item."""
        file = self._file(upload, chosen)
        told = self._context.commands.json("validate", str(file))
        command = shown("validate", typed_path(file, self._context.root))
        if told["unreadable"]:
            raise DataError(next(iter(told["unreadable"].values())))
        found = next(iter(told["files"].values()))
        problems, whole = found["problems"], found["whole"]
        rows = [[f"{one['unit']} {one['item']}", one["problem"]] for one in problems[:_MOST_ROWS]]
        more = len(problems) - len(rows)
        notes = [*found["notes"], *([f"{more} more bad items are not shown"] if more else [])]
        if problems or whole is not None:
            bad = whole or f"{len(problems)} items of {file.name} are bad"
            changes = self._notice.bad(bad, command)
        else:
            changes = self._notice.good(f"{file.name} is good: a task can be made of it", command)
        listed = table(["item", "what is wrong"], rows, title="Findings", empty="")
        return {**changes, self._notice.found: listed + Markup("<br>").join(notes)}

    def add(
        self, upload: str | None, chosen: str, name: str, wordings: str | None, skip: bool
    ) -> Changes:
        """Make a task of a file."""
        file, root = self._file(upload, chosen), self._context.root
        name = task_name(name or file.stem)
        more = ["--skip-bad-rows"] if skip else []
        asked = [*more, *(["--wordings", wordings] if wordings else [])]
        told = self._context.commands.edit("add-task", *asked, "--", name, str(file))
        typed = [*more, *(["--wordings", Path(wordings).name] if wordings else [])]
        command = shown("add-task", name, typed_path(file, root), *typed)
        done = self._notice.good(f"{told.splitlines()[-1]}. Train it on Adapters.", command)
        return {**done, self._notice.found: ""}

    def put(self, upload: str | None, chosen: str, name: str) -> Changes:
        """Put a file into the inbox of the retrains."""
        file, root = self._file(upload, chosen), self._context.root
        where = INBOX / f"{task_name(name or file.stem)}{file.suffix.lower()}"
        if (root / where).exists():
            raise DataError(f"{where} is in the inbox already; a retrain takes it in (Models)")
        (root / where).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(root / where) as aside:
            shutil.copyfile(file, aside)
        command = shlex.join(["cp", typed_path(file, root), str(where)])
        done = self._notice.good(f"{where} is there; a retrain takes it in (Models)", command)
        return {**done, self._notice.found: ""}

    def _file(self, upload: str | None, chosen: str) -> Path:
        """Return the file that was uploaded, or one of those listed."""
        if upload:
            return Path(upload)
        if chosen not in self.files():
            raise DataError("no file: upload one, or choose one of the project")
        return self._context.root / chosen
