"""The page Routers: trained, judged on validation texts, and tried on a text."""

from collections.abc import Mapping
from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.commands import shown
from dlplora.app.context import Context
from dlplora.app.html import confusion, mix_of, table
from dlplora.app.notice import Changes, Notice, header, html
from dlplora.app.run_panel import RunPanel
from dlplora.errors import ParamsError
from dlplora.params.load import load_params
from dlplora.params.routing import RouterParams
from dlplora.records.files import read_json
from dlplora.words import is_number

_KINDS = {
    "mlp": "mini-MLP (DLP-LoRA)",
    "tfidf": "words",
    "ensemble": "words and meaning",
    "encoder": "fine-tuned encoder",
    "logistic": "meaning, logistic",
    "ridge": "meaning, ridge",
}


class RoutersPage:
    """Train routers, read how well they tell tasks apart, and try them."""

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        self._context = context
        header("Routers", "A router reads a text and chooses the adapters that answer it.")
        with gr.Tabs():
            with gr.Tab("Train"):
                self._train(demo)
            with gr.Tab("Quality"):
                self._quality(demo)
            with gr.Tab("Try a text"):
                self._try(demo)

    def _train(self, demo: gr.Blocks) -> None:
        self._routers = html()
        router = gr.Dropdown([], label="Router, by its kind")
        balance = load_params(self._context.project.params_file).balance
        with gr.Row():
            count = gr.Number(
                balance.per_task, label="Questions a task", precision=0, minimum=1, interactive=True
            )
            share = gr.Slider(
                0,
                1,
                balance.reworded,
                step=0.05,
                label="Share in other wordings",
                interactive=True,
            )

        def settings(name: str | None) -> None:
            if not name:
                return
            numbers = self._numbers(name)
            with gr.Row():
                fields = [
                    gr.Number(value, label=key, interactive=True) for key, value in numbers.items()
                ]
            train = gr.Button("Train", variant="primary")

            def start(*values: Any) -> Changes:
                return self._start(name, dict(zip(numbers, values[2:], strict=True)), *values[:2])

            notice = self._training
            outputs = [*notice.outputs, self._panel.id]
            train.click(notice.guarded(start), [count, share, *fields], outputs)

        gr.render(inputs=router)(settings)
        self._training = Notice(shown("repro", "router@mlp"))
        panel = self._panel = RunPanel(self._context, demo)
        parts = [self._routers, router]
        demo.load(self._look(router), None, parts, show_progress="hidden")
        panel.ended.change(self._look(None), None, self._routers, show_progress="hidden")

    def _known(self) -> Mapping[str, RouterParams]:
        return load_params(self._context.project.params_file).routers

    def _numbers(self, name: str) -> dict[str, float]:
        """Return the settings of a router that are numbers."""
        values = self._known()[name].model_dump()
        return {key: value for key, value in values.items() if is_number(value)}

    def _look(self, router: gr.Dropdown | None) -> Any:
        def look() -> Changes:
            rows = [self._row(name) for name in self._known()]
            heads = ["router", "reads", "accuracy", "calibration error", "base model below"]
            changes: dict[Any, Any] = {
                self._routers: table(heads, rows, title="Routers", empty="There are no routers.")
            }
            if router is not None:
                named = [(f"{name}: {_kind(one)}", name) for name, one in self._known().items()]
                changes[router] = gr.Dropdown(named, value=named[0][1] if named else None)
            return changes

        return look

    def _row(self, name: str) -> list[Any]:
        found = self._trained(name)
        kind = _kind(self._known()[name])
        if found is None:
            return [name, kind, "not trained yet", None, None]
        return [
            name,
            kind,
            float(found["accuracy"]),
            float(found["calibration_error"]),
            float(found["fallback_below"]),
        ]

    def _trained(self, name: str) -> dict[str, Any] | None:
        file = self._context.root / "data/routers" / name / "training.json"
        return read_json(file) if file.exists() else None

    def _start(
        self, name: str, settings: Mapping[str, float | None], count: float, share: float
    ) -> Changes:
        now = self._numbers(name)
        changed = [
            f"routers.{name}.{key}={value:g}"
            for key, value in settings.items()
            if value is not None and value != now[key]
        ]
        values = [f"balance.per_task={int(count)}", f"balance.reworded={share:g}", *changed]
        self._context.commands.edit("set", *values)
        run = self._context.runs.start("pipeline/this-tree", {"targets": [f"router@{name}"]})
        command = f"{shown('set', *values)}\n{shown('repro', f'router@{name}')}"
        return {**self._training.good("The run has started.", command), self._panel.id: run}

    def _quality(self, demo: gr.Blocks) -> None:
        router = gr.Dropdown([], label="Router")
        quality = html()
        demo.load(self._choose, None, router, show_progress="hidden")
        router.change(self._show, router, quality)
        self._panel.ended.change(self._show, router, quality, show_progress="hidden")

    def _choose(self) -> Any:
        names = list(self._known())
        return gr.Dropdown(names, value=names[0] if names else None)

    def _show(self, name: str | None) -> Markup:
        found = None if name is None else self._trained(name)
        if found is None:
            return table([], [], title="", empty="This router is not trained yet; press “Train”.")
        told = Markup(
            "<p>Right on {:.1%} of the validation texts. Its confidence is {:.3f} off on average "
            "(expected calibration error). Below a confidence of {:.2f} the base model answers.</p>"
        ).format(found["accuracy"], found["calibration_error"], found["fallback_below"])
        return told + confusion(found["labels"], found["confusion"])

    def _try(self, demo: gr.Blocks) -> None:
        with gr.Row():
            system = gr.Dropdown([], label="System that routes", allow_custom_value=True)
            text = gr.Textbox(label="Text", placeholder="Type a question", lines=2, scale=3)
        route = gr.Button("Route", variant="primary")
        self._trying = notice = Notice(shown("route", "…"))
        self._bars = gr.Label(label="Probability of each task", num_top_classes=12, visible=False)
        demo.load(self._systems, None, system, show_progress="hidden")
        outputs = [*notice.outputs, self._bars]
        gr.on([route.click, text.submit], notice.guarded(self._route_text), [system, text], outputs)

    def _systems(self) -> Any:
        params = load_params(self._context.project.params_file)
        names = [name for name, one in params.systems.items() if not one.needs_task]
        return gr.Dropdown(names, value=params.default_system)

    def _route_text(self, system: str, text: str) -> Changes:
        if not text.strip():
            raise ParamsError("type a text to route")
        found = self._context.server.route(system, text)
        told = f"{mix_of(found['adapters'])} answers"
        if found["confidence"] is not None:
            told += f", sure by {found['confidence']:.2f}"
        told += f"; below {found['fallback_below']:.2f} the base model answers"
        return {
            **self._trying.good(told, shown("route", text, "--system", system)),
            self._bars: gr.Label(found["probabilities"], visible=bool(found["probabilities"])),
        }


def _kind(router: RouterParams) -> str:
    return _KINDS[router.kind]
