"""What the parts of the page Ask share: who answers, how, and what is shown of it."""

from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.context import Context
from dlplora.app.html import Palette, passages, said
from dlplora.app.model_client import Reply, Served
from dlplora.app.notice import html
from dlplora.errors import GenerationError

_TOKENS = 128


class Answering:
    """The model's server, and the settings that stand on top of the page.

    `inputs` are the components of the settings: model, tokens, temperature.
    """

    def __init__(self, context: Context) -> None:
        self.server = context.server
        self.served = context.served
        self._palette = Palette()
        self.state = html()
        with gr.Row():
            self.model = gr.Dropdown([], label="Model", scale=2, allow_custom_value=True)
            tokens = gr.Slider(1, 512, _TOKENS, step=1, label="Longest answer, in tokens")
            temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest)")
        self.inputs: list[Any] = [self.model, tokens, temperature]

    def passages(self, reply: Reply) -> Markup:
        """Show by which adapters an answer was written."""
        return passages(reply.parts, self._palette)


def serving(served: Served) -> Markup:
    """Tell in one line what is served."""
    line = f"{served.version}: {len(served.adapters)} adapters, routed by {served.systems[0]}"
    return said(line, "good")


def settings(tokens: float, temperature: float) -> dict[str, Any]:
    """Return the settings of an answer as the server takes them."""
    return {"max_completion_tokens": int(tokens), "temperature": temperature}


def words(tokens: float, temperature: float) -> list[str]:
    """Return the settings of an answer as the command line takes them."""
    drawn = ["--temperature", f"{temperature:g}"] if temperature else []
    return ["--max-new-tokens", str(int(tokens)), *drawn]


def asked(text: str) -> str:
    """Return a question without the space around it; `GenerationError` if there is none."""
    if not text.strip():
        raise GenerationError("type a question")
    return text.strip()


def user(question: str) -> list[dict[str, str]]:
    """Return the chat that asks one question."""
    return [{"role": "user", "content": question}]
