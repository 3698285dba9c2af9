"""The first page: how the project stands, and what to do next."""

import gradio as gr
from markupsafe import Markup

from dlplora.app.context import Context
from dlplora.app.guard import drawn
from dlplora.app.html import link, table
from dlplora.app.notice import header, html
from dlplora.errors import DlpLoraError
from dlplora.lifecycle.registry import CURRENT, MODELS
from dlplora.params.load import load_params

_SECONDS = 10.0


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
        look = drawn(self._state)
        demo.load(look, None, state, show_progress="hidden")
        gr.Timer(_SECONDS).tick(look, None, state, show_progress="hidden")

    def _state(self) -> Markup:
        context = self._context
        params = load_params(context.project.params_file)
        data = context.root / "data"
        trained = [task for task in params.tasks if (data / "adapters" / task).is_dir()]
        routers = [name for name in params.routers if (data / "routers" / name).is_dir()]
        try:
            serving = f"{context.served().version} answers"
        except DlpLoraError as error:
            serving = str(error)
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
        link = self._context.root / MODELS / CURRENT
        return f"{link.readlink()} is in production" if link.is_symlink() else "none so far"
