"""A part of the page Adapters: one that was trained elsewhere, with the data of its task."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from dlplora.app.commands import shown, task_name
from dlplora.app.context import Context
from dlplora.app.guard import Changes
from dlplora.app.notice import Notice
from dlplora.data.raw import FORMATS
from dlplora.errors import AdapterError
from dlplora.records.training import ADAPTER_WEIGHTS

_FILES = ("adapter_config.json", ADAPTER_WEIGHTS)


def import_tab(context: Context) -> gr.Textbox:
    """Lay out the part; returns what holds a new value once an adapter was imported."""
    gr.Markdown(
        "An adapter that was trained elsewhere on the same base model: PEFT's two files, and the "
        "questions and answers of its task."
    )
    with gr.Row():
        files = gr.File(
            label=" and ".join(_FILES),
            file_count="multiple",
            file_types=[".json", ".safetensors"],
            height=140,
        )
        data = gr.File(
            label=f"Questions and answers ({', '.join(FORMATS)})",
            file_types=list(FORMATS),
            height=140,
        )
    name = gr.Textbox(label="Name of the task", max_length=64)
    add = gr.Button("Import", variant="primary")
    notice = Notice(shown("add-task", "capitals", "capitals.json", "--adapter", "folder"))
    added = gr.Textbox(visible="hidden")

    def take(given: Sequence[str] | None, data: str | None, name: str) -> Changes:
        found = {Path(file).name: Path(file) for file in given or []}
        if missing := [part for part in _FILES if part not in found]:
            raise AdapterError(f"found no {missing[0]} among the files; expected PEFT's two files")
        if data is None:
            raise AdapterError("the file of questions and answers is missing")
        with tempfile.TemporaryDirectory(dir=context.files) as folder:
            for part in _FILES:
                shutil.copyfile(found[part], Path(folder) / part)
            words = ("--adapter", folder, "--", task_name(name), data)
            told = context.commands.edit("add-task", *words)
        command = shown("add-task", name, Path(data).name, "--adapter", "folder")
        return {**notice.good(told.splitlines()[-1], command), added: name}

    add.click(notice.guarded(take), [files, data, name], [*notice.outputs, added])
    return added
