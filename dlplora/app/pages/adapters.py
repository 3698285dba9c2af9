"""The page Adapters: one for each task, trained or imported, and its test items."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from dlplora.app.commands import shown
from dlplora.app.context import Context
from dlplora.app.html import table
from dlplora.app.notice import Changes, Notice, header, html
from dlplora.app.run_panel import RunPanel
from dlplora.data.raw import FORMATS
from dlplora.errors import AdapterError, ParamsError
from dlplora.params.load import load_params
from dlplora.params.overrides import adapter_of
from dlplora.params.project import REFERENCE
from dlplora.records.scores import ItemScore, read_items
from dlplora.records.training import ADAPTER_WEIGHTS, read_adapter_training

_SETTINGS = {"rank": "Rank", "steps": "Steps", "learning_rate": "Learning rate"}
_CONFIG = "adapter_config.json"
_MOST_ITEMS = 100


class AdaptersPage:
    """Train adapters, import them, and read what they answer."""

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        self._context = context
        header(
            "Adapters",
            "A LoRA adapter for each task, trained as a run that goes on without this page.",
        )
        with gr.Tabs():
            with gr.Tab("Train"):
                self._train(demo)
            with gr.Tab("Test items"):
                self._test_items(demo)
            with gr.Tab("Import"):
                self._import()

    def _train(self, demo: gr.Blocks) -> None:
        self._adapters = html()
        self._tasks = gr.CheckboxGroup([], label="Tasks to train")
        with gr.Row():
            numbers = [gr.Number(label=label, visible=False) for label in _SETTINGS.values()]
        train = gr.Button("Train", variant="primary")
        self._training = notice = Notice(shown("repro", "adapter@capitals"))
        panel = self._panel = RunPanel(self._context, demo)
        shown_parts = [self._adapters, self._tasks]
        demo.load(self._look, None, shown_parts, show_progress="hidden")
        panel.ended.change(self._look, None, shown_parts, show_progress="hidden")
        train.click(
            notice.guarded(self._start),
            [self._tasks, *numbers],
            [*notice.outputs, panel.id],
        )
        self._tasks.change(self._settings_of, self._tasks, numbers, show_progress="hidden")

    def _look(self) -> Changes:
        params = load_params(self._context.project.params_file)
        rows = [self._row(task) for task in params.tasks]
        heads = ["task", "adapter", "steps", "parameters", "validation loss", "examples"]
        return {
            self._adapters: table(heads, rows, title="Adapters", empty="Add a task on Data first."),
            self._tasks: gr.CheckboxGroup(list(params.adapters)),
        }

    def _row(self, task: str) -> list[Any]:
        folder = self._context.root / "data/adapters" / task
        if not (folder / "training.json").exists():
            return [task, "not trained yet", None, None, None, None]
        found = read_adapter_training(folder)
        losses = {point.step: point.validation_loss for point in found.curve.points}
        return [
            task,
            "imported" if found.is_imported else "trained",
            found.curve.best_step or None,
            found.num_parameters,
            losses.get(found.curve.best_step),
            found.num_examples or None,
        ]

    def _settings_of(self, tasks: Sequence[str]) -> list[Any]:
        """Show the settings of the chosen tasks: those of the first, if they differ."""
        now = self._now(tasks[0]) if tasks else dict.fromkeys(_SETTINGS, 0.0)
        return [gr.Number(value, visible=bool(tasks)) for value in now.values()]

    def _now(self, task: str) -> dict[str, float]:
        found = adapter_of(load_params(self._context.project.params_file), task)
        return {name: getattr(found, name) for name in _SETTINGS}

    def _start(self, tasks: Sequence[str], *numbers: float | None) -> Changes:
        if not tasks:
            raise ParamsError("choose the tasks whose adapters are to be trained")
        given = dict(zip(_SETTINGS, numbers, strict=True))
        values = [
            f"adapters.{task}.{name}={value:g}"
            for task in tasks
            for name, value in given.items()
            if value is not None and value != self._now(task)[name]
        ]
        if values:
            self._context.commands.edit("set", *values)
        targets = [f"adapter@{task}" for task in tasks]
        run = self._context.runs.start("pipeline/this-tree", {"targets": targets})
        commands = [*([shown("set", *values)] if values else []), shown("repro", *targets)]
        told = "The run has started; it goes on without this page."
        return {**self._training.good(told, "\n".join(commands)), self._panel.id: run}

    def _test_items(self, demo: gr.Blocks) -> None:
        gr.Markdown("What the base model and the task's own adapter answer to held-out questions.")
        with gr.Row():
            task = gr.Dropdown([], label="Task")
            which = gr.Radio(["all", "wrong", "right"], value="all", label="The adapter's answers")
        self._items = html()
        evaluate = gr.Button("Evaluate both")
        self._evaluating = notice = Notice(shown("repro", "evaluate@base", f"evaluate@{REFERENCE}"))
        demo.load(self._choose_task, None, task, show_progress="hidden")
        gr.on([task.change, which.change], self._answers, [task, which], self._items)
        evaluate.click(notice.guarded(self._evaluate), None, [*notice.outputs, self._panel.id])
        self._panel.ended.change(self._answers, [task, which], self._items)

    def _choose_task(self) -> Any:
        tasks = list(load_params(self._context.project.params_file).tasks)
        return gr.Dropdown(tasks, value=tasks[0] if tasks else None)

    def _answers(self, task: str | None, which: str) -> Any:
        folder = self._context.root / "data/scores/iid"
        base, own = (_items_of(folder / name, task) for name in ("base", REFERENCE))
        rows = [
            [item.prompt, " | ".join(item.references), *_answer(base.get(key)), *_answer(item)]
            for key, item in own.items()
            if which == "all" or (item.score == 1) == (which == "right")
        ]
        heads = ["question", "expected", "base model", "that is", "adapter", "that is"]
        none = "Nothing is evaluated yet: train, then press “Evaluate both”."
        empty = "No such item." if own else none
        return table(heads, rows[:_MOST_ITEMS], title="Test items", empty=empty)

    def _evaluate(self) -> Changes:
        targets = ["evaluate@base", f"evaluate@{REFERENCE}"]
        run = self._context.runs.start("pipeline/this-tree", {"targets": targets})
        told = "The run has started; the tab “Train” shows how it goes on."
        return {**self._evaluating.good(told, shown("repro", *targets)), self._panel.id: run}

    def _import(self) -> None:
        gr.Markdown(
            "An adapter that was trained elsewhere on the same base model: PEFT's two files, and "
            "the questions and answers of its task."
        )
        with gr.Row():
            files = gr.File(
                label=f"{_CONFIG} and {ADAPTER_WEIGHTS}",
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
        self._importing = notice = Notice(
            shown("add-task", "capitals", "capitals.json", "--adapter", "folder")
        )
        shown_parts = [*notice.outputs, self._adapters, self._tasks]
        add.click(notice.guarded(self._add), [files, data, name], shown_parts)

    def _add(self, files: Sequence[str] | None, data: str | None, name: str) -> Changes:
        given = {Path(file).name: Path(file) for file in files or []}
        if missing := [part for part in (_CONFIG, ADAPTER_WEIGHTS) if part not in given]:
            raise AdapterError(f"found no {missing[0]} among the files; expected PEFT's two files")
        if data is None:
            raise AdapterError("the file of questions and answers is missing")
        with tempfile.TemporaryDirectory(dir=self._context.files) as folder:
            for part in (_CONFIG, ADAPTER_WEIGHTS):
                shutil.copyfile(given[part], Path(folder) / part)
            told = self._context.commands.edit("add-task", name, data, "--adapter", folder)
        command = shown("add-task", name, Path(data).name, "--adapter", "folder")
        return {**self._look(), **self._importing.good(told.splitlines()[-1], command)}


def _items_of(folder: Path, task: str | None) -> Mapping[str, ItemScore]:
    if not (folder / "items.parquet").exists():
        return {}
    return {item.id: item for item in read_items(folder) if item.task == task}


def _answer(item: ItemScore | None) -> list[Any]:
    """Show an answer and, in words as well, whether it is right."""
    if item is None:
        return [None, None]
    told = {1.0: "right", 0.0: "wrong"}.get(item.score, f"{item.score:.2f}")
    return [item.prediction, told]
