"""The page Adapters: one for each task, trained or imported, and its test items."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.commands import shown
from dlplora.app.context import Context
from dlplora.app.guard import Changes, drawn, guarded
from dlplora.app.html import table
from dlplora.app.notice import Notice, header, html
from dlplora.app.pages.import_adapter import import_tab
from dlplora.app.run_panel import RunPanel
from dlplora.app.settings import field, typed
from dlplora.errors import ParamsError
from dlplora.params.load import load_params
from dlplora.params.overrides import adapter_of
from dlplora.params.project import REFERENCE
from dlplora.records.scores import ItemScore, read_items
from dlplora.records.training import read_adapter_training

_SETTINGS = {"rank": "Rank", "steps": "Steps", "learning_rate": "Learning rate"}
_EVALUATE = ("evaluate@base", f"evaluate@{REFERENCE}")
_MOST_ITEMS = 100
_SCORES = {"all": None, "right": 1.0, "wrong": 0.0}


class AdaptersPage:
    """Train adapters, import them, and read what they answer."""

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        self._context = context
        header(
            "Adapters",
            "A LoRA adapter for each task, trained as a run that continues without this page.",
        )
        with gr.Tabs():
            with gr.Tab("Train"):
                train, fields = self._train()
            with gr.Tab("Test items"):
                evaluate = self._test_items(demo)
            with gr.Tab("Import"):
                added = import_tab(context)
        self._panel = panel = RunPanel(context, demo)
        notice, parts = self._training, [self._adapters, self._tasks]
        look = guarded(self._look, self._adapters)
        for event in (demo.load, panel.ended.change, added.change):
            event(look, None, parts, show_progress="hidden")
        outputs = [*notice.outputs, panel.id]
        train.click(notice.guarded(self._start), [self._tasks, *fields], outputs)
        asking = self._evaluating
        evaluate.click(asking.guarded(self._evaluate), None, [*asking.outputs, panel.id])
        panel.ended.change(self._answers, self._which, self._items, show_progress="hidden")

    def _train(self) -> tuple[gr.Button, list[gr.Textbox]]:
        self._adapters = html()
        self._tasks = gr.CheckboxGroup([], label="Tasks to train")
        gr.Markdown("A field that is left empty keeps the value of each task.")
        with gr.Row():
            fields = [field(label) for label in _SETTINGS.values()]
        train = gr.Button("Train", variant="primary")
        self._training = Notice(shown("repro", "adapter@capitals"))
        return train, fields

    def _look(self) -> Changes:
        params = load_params(self._context.project.params_file)
        rows = []
        for task in params.tasks:
            told: list[Any] = ["–"] * len(_SETTINGS)
            if task in params.adapters:
                settings = adapter_of(params, task)
                told = [getattr(settings, name) for name in _SETTINGS]
            rows.append([task, *self._made(task), *map(str, told)])
        heads = ["task", "adapter", "best step", "validation loss", "examples"]
        labels = [label.lower() for label in _SETTINGS.values()]
        return {
            self._adapters: table(
                [*heads, *labels], rows, title="Adapters", empty="Add a task on Data first."
            ),
            self._tasks: gr.CheckboxGroup(list(params.adapters)),
        }

    def _made(self, task: str) -> list[Any]:
        """Tell how the adapter of a task came to be."""
        folder = self._context.root / "data/adapters" / task
        if not (folder / "training.json").exists():
            return ["not trained yet", None, None, None]
        found = read_adapter_training(folder)
        best = found.curve.best_step
        losses = {point.step: point.validation_loss for point in found.curve.points}
        kind = "imported" if found.is_imported else "trained"
        return [kind, best or None, losses.get(best), found.num_examples or None]

    def _start(self, tasks: Sequence[str], *values: str) -> Changes:
        if not tasks:
            raise ParamsError("choose the tasks whose adapters are to be trained")
        given = dict(zip(_SETTINGS, values, strict=True))
        paths = {
            f"adapters.{task}.{name}": value for task in tasks for name, value in given.items()
        }
        targets = [f"adapter@{task}" for task in tasks]
        told = "The run has started; it continues without this page."
        return self._panel.start(self._training, *targets, values=typed(paths), told=told)

    def _test_items(self, demo: gr.Blocks) -> gr.Button:
        gr.Markdown("What the base model and the task's own adapter answer to held-out questions.")
        with gr.Row():
            task = gr.Dropdown([], label="Task")
            which = gr.Radio(list(_SCORES), value="all", label="The adapter's answers")
        self._items = html()
        evaluate = gr.Button("Evaluate both")
        self._evaluating = Notice(shown("repro", *_EVALUATE))
        self._which = [task, which]
        self._answers = drawn(self._answers_of)
        chosen = guarded(lambda: {task: self._choose_task()}, self._items)
        demo.load(chosen, None, [task, self._items], show_progress="hidden")
        gr.on([task.change, which.change], self._answers, self._which, self._items)
        return evaluate

    def _choose_task(self) -> gr.Dropdown:
        tasks = list(load_params(self._context.project.params_file).tasks)
        return gr.Dropdown(tasks, value=tasks[0])

    def _answers_of(self, task: str | None, which: str) -> Markup:
        folder = self._context.root / "data/scores/iid"
        base, own = (_items_of(folder / name, task) for name in ("base", REFERENCE))
        rows = [
            [item.prompt, " | ".join(item.references), *_answer(base.get(key)), *_answer(item)]
            for key, item in own.items()
            if _SCORES[which] in (None, item.score)
        ]
        heads = ["question", "expected", "base model", "result", "adapter", "result"]
        none = "Nothing is evaluated yet: train, then press “Evaluate both”."
        more = len(rows) - _MOST_ITEMS
        note = f"{more} more are not shown." if more > 0 else ""
        return table(
            heads, rows[:_MOST_ITEMS], title="Test items", empty="No such item." if own else none
        ) + Markup("{}").format(note)

    def _evaluate(self) -> Changes:
        return self._panel.start(self._evaluating, *_EVALUATE)


def _items_of(folder: Any, task: str | None) -> Mapping[str, ItemScore]:
    if not (folder / "items.parquet").exists():
        return {}
    return {item.id: item for item in read_items(folder) if item.task == task}


def _answer(item: ItemScore | None) -> list[Any]:
    """Show an answer and, in words as well, whether it is right."""
    if item is None:
        return [None, None]
    told = {1.0: "right", 0.0: "wrong"}.get(item.score, f"{item.score:.2f}")
    return [item.prediction, told]
