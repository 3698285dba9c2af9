"""What the parts of the page Ask share: who answers, how, and what is shown of it."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.context import Context
from dlplora.app.html import Palette, passages, said
from dlplora.app.model_server import Reply, Served
from dlplora.app.notice import Changes, Notice, html
from dlplora.errors import DlpLoraError, GenerationError
from dlplora.params.project import REFERENCE

_TOKENS = 128


class Answering:
    """The model's server, and the settings that stand on top of the page.

    `inputs` are the components of the settings: model, tokens, temperature.
    """

    def __init__(self, context: Context) -> None:
        self.server = context.server
        self._trouble = context.trouble
        self._palette = Palette()
        self.state = html()
        with gr.Row():
            self.model = gr.Dropdown([], label="Answered by", scale=2, allow_custom_value=True)
            tokens = gr.Slider(1, 512, _TOKENS, step=1, label="Longest answer, in tokens")
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest)")
        self.inputs: list[Any] = [self.model, tokens, temperature]

    def served(self) -> Served:
        """Return what is served; else tell why nothing is, and what to run."""
        try:
            return self.server.served()
        except DlpLoraError as error:
            raise GenerationError(self._trouble() or str(error)) from error

    def tell(self) -> Markup:
        """Tell in one line what is served."""
        try:
            served = self.served()
        except GenerationError as error:
            return said(str(error), "error")
        told = f"{served.version}: {len(served.adapters)} adapters, routed by {served.systems[0]}"
        return said(told, "good")

    def words(self, model: str) -> list[str]:
        """Return the words that name a system or an adapter on the command line."""
        served = self.served()
        system = f"{REFERENCE}:{model}" if model in served.adapters else model
        folder = [] if served.version == "data" else ["--data", ".models/current"]
        return ["--system", system, *folder]

    def passages(self, reply: Reply) -> Markup:
        """Show by which adapters an answer was written."""
        return passages(reply.parts, self._palette)

    def streamed(
        self, notice: Notice, handler: Callable[..., Iterator[Changes]]
    ) -> Callable[..., Iterator[Changes]]:
        """Let a mistake stand in the notice, also in the middle of an answer."""

        @wraps(handler)
        def streamed(*values: Any) -> Iterator[Changes]:
            try:
                yield {notice.line: ""}
                yield from handler(*values)
            except DlpLoraError as error:
                yield {notice.line: said(str(error), "error")}

        return streamed


def settings(tokens: float, temperature: float) -> dict[str, Any]:
    """Return the settings of an answer as the server takes them."""
    return {"max_completion_tokens": int(tokens), "temperature": temperature}


def asked(text: str) -> str:
    """Return a question without the space around it; `GenerationError` if there is none."""
    if not text.strip():
        raise GenerationError("type a question")
    return text.strip()


def user(question: str) -> list[dict[str, str]]:
    """Return the chat that asks one question."""
    return [{"role": "user", "content": question}]
