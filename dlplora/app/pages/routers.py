"""The page Routers: trained, judged on validation texts, and tried on a text."""

from typing import Any, Literal, NamedTuple

import gradio as gr
from markupsafe import Markup

from dlplora.app.commands import shown
from dlplora.app.context import Context
from dlplora.app.guard import Changes, drawn, guarded
from dlplora.app.html import confusion, mix_of, table
from dlplora.app.notice import Notice, header, html
from dlplora.app.run_panel import RunPanel
from dlplora.app.settings import BALANCE, field, typed
from dlplora.errors import ParamsError
from dlplora.params.load import load_params
from dlplora.records.files import read_json
from dlplora.words import is_number

_KINDS = {
    "mlp": "mini-MLP (DLP-LoRA)",
    "tfidf": "words",
    "ensemble": "words and meaning",
    "encoder": "fine-tuned encoder",
    "logistic": "meaning, logistic",
    "ridge": "meaning, ridge",
    "retriever": "nearest adapters (LoraRetriever)",
    "knn": "nearest questions",
    "centroid": "nearest task",
}


class _Known(NamedTuple):
    """A router of params.yaml: its section, its kind and its settings that are numbers."""

    section: Literal["routers", "embedding_routers"]
    kind: str
    numbers: dict[str, float]

    @property
    def stage(self) -> str:
        return self.section.removesuffix("s")


class RoutersPage:
    """Train routers, read how well they tell tasks apart, and try them."""

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        self._context = context
        header("Routers", "A router reads a text and chooses the adapters that answer it.")
        with gr.Tabs():
            with gr.Tab("Train"):
                self._train()
            with gr.Tab("Quality"):
                self._quality()
            with gr.Tab("Try a text"):
                self._try(demo)
        self._panel = panel = RunPanel(context, demo)
        look = guarded(self._look, self._routers)
        parts = [self._routers, self._chosen, self._judged]
        chosen = [self._chosen, self._judged]
        demo.load(look, chosen, parts, show_progress="hidden")
        panel.ended.change(look, chosen, parts, show_progress="hidden")
        panel.ended.change(drawn(self._show), self._judged, self._shown, show_progress="hidden")

    def _train(self) -> None:
        self._routers = html()
        self._chosen = gr.Dropdown([], label="Router, by its kind")
        gr.Markdown("What it learns from, and its own settings. An empty field keeps its value.")

        def settings(name: str | None) -> None:
            if not name or (known := self._known().get(name)) is None:
                return
            balance = load_params(self._context.project.params_file).balance
            with gr.Row():
                texts = [field(label, getattr(balance, key)) for key, label in BALANCE.items()]
                own = [field(key, value) for key, value in known.numbers.items()]
            paths = [f"balance.{key}" for key in BALANCE]
            paths += [f"{known.section}.{name}.{key}" for key in known.numbers]
            train = gr.Button("Train", variant="primary")

            def start(*values: str) -> Changes:
                given = typed(dict(zip(paths, values, strict=True)))
                target = f"{known.stage}@{name}"
                return self._panel.start(self._training, target, values=given)

            notice = self._training
            train.click(notice.guarded(start), [*texts, *own], [*notice.outputs, self._panel.id])

        gr.render(inputs=self._chosen)(settings)
        self._training = Notice(shown("repro", "router@mlp"))

    def _known(self) -> dict[str, _Known]:
        params = load_params(self._context.project.params_file)
        found: dict[str, _Known] = {}
        for section in ("routers", "embedding_routers"):
            for name, router in getattr(params, section).items():
                values = router.model_dump()
                numbers = {key: value for key, value in values.items() if is_number(value)}
                found[name] = _Known(section, _KINDS[router.kind], numbers)
        return found

    def _look(self, chosen: str | None, judged: str | None) -> Changes:
        known = self._known()
        rows = [[name, one.kind, *self._measured(name)] for name, one in known.items()]
        heads = ["router", "reads", "accuracy", "calibration error", "fallback below"]
        first = next(iter(known), None)
        named = [(f"{name}: {one.kind}", name) for name, one in known.items()]
        return {
            self._routers: table(heads, rows, title="Routers", empty="There are no routers."),
            self._chosen: gr.Dropdown(named, value=chosen if chosen in known else first),
            self._judged: gr.Dropdown(list(known), value=judged if judged in known else first),
        }

    def _measured(self, name: str) -> list[Any]:
        found = self._trained(name)
        if found is None:
            return ["not trained yet", None, None]
        return [float(found[key]) for key in ("accuracy", "calibration_error", "fallback_below")]

    def _trained(self, name: str) -> dict[str, Any] | None:
        file = self._context.root / "data/routers" / name / "training.json"
        return read_json(file) if file.exists() else None

    def _quality(self) -> None:
        self._judged = gr.Dropdown([], label="Router")
        self._shown = html()
        self._judged.change(drawn(self._show), self._judged, self._shown)

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
            self._system = gr.Dropdown([], label="System that routes", allow_custom_value=True)
            text = gr.Textbox(label="Text", placeholder="Type a question", max_lines=8, scale=3)
        route = gr.Button("Route", variant="primary")
        self._bars = gr.Label(label="Probability of each task", num_top_classes=12, visible=False)
        self._trying = notice = Notice(shown("route", text="…"))
        outputs = [*notice.outputs, self._bars]
        systems = guarded(self._systems, notice.line)
        demo.load(systems, None, [notice.line, self._system], show_progress="hidden")
        asked = notice.guarded(self._route)
        gr.on([route.click, text.submit], asked, [self._system, text], outputs)

    def _systems(self) -> Changes:
        names = list(self._context.served().systems[:-1])  # the base model routes nothing
        return {self._system: gr.Dropdown(names, value=next(iter(names), None))}

    def _route(self, system: str | None, text: str) -> Changes:
        if not text.strip():
            raise ParamsError("type a text to route")
        served = self._context.served()
        system = system or served.systems[0]
        found = self._context.server.route(system, text)
        told = f"{mix_of(found['adapters'])} answers"
        if found["confidence"] is not None:
            told += f", confidence {found['confidence']:.2f}"
        told += f"; below {found['fallback_below']:.2f} the base model answers"
        words = ["--system", system, *served.folder_words]
        return {
            **self._trying.good(told, shown("route", *words, text=text)),
            self._bars: gr.Label(found["probabilities"], visible=bool(found["probabilities"])),
        }
