"""The first page: how the project stands, and what to do next."""

import gradio as gr
from markupsafe import Markup

from dlplora.app.context import Context
from dlplora.app.html import link, table
from dlplora.app.notice import header, html
from dlplora.errors import DlpLoraError
from dlplora.lifecycle.registry import Registry
from dlplora.params.load import load_params


class StartPage:
    """One table: tasks, adapters, routers, model, server."""

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        self._context = context
        header(
            "dlplora",
            "One frozen language model, one LoRA adapter per task, and routers that choose: "
            "nobody has to name the task.",
        )
        state = html()
        demo.load(self._state, None, state, show_progress="hidden")
        gr.Timer(5).tick(self._state, None, state, show_progress="hidden")

    def _state(self) -> Markup:
        context = self._context
        params = load_params(context.project.params_file)
        data = context.root / "data"
        trained = [task for task in params.tasks if (data / "adapters" / task).is_dir()]
        routers = [name for name in params.routers if (data / "routers" / name).is_dir()]
        try:
            serving = f"{context.server.served().version} answers"
        except DlpLoraError as error:
            serving = context.trouble() or str(error)
        rows = [
            [link("Data", "data"), f"{len(params.tasks)} tasks"],
            [link("Adapters", "adapters"), f"{len(trained)} of {len(params.tasks)} are trained"],
            [link("Routers", "routers"), f"{len(routers)} of {len(params.routers)} are trained"],
            [link("Ask", "ask"), serving],
            [link("Runs", "runs"), self._newest_run()],
            [link("Models", "models"), self._in_production()],
        ]
        return table(["page", "now"], rows, title="How the project stands", empty="")

    def _newest_run(self) -> str:
        try:
            found = self._context.runs.recent(1)
        except DlpLoraError as error:
            return str(error)
        return f"the newest, {found[0].name}: {found[0].state}" if found else "none so far"

    def _in_production(self) -> str:
        try:
            name = Registry(self._context.root).promoted()
        except DlpLoraError as error:
            return str(error)
        return f"{name} is in production" if name else "none is in production yet"
