"""Values of params.yaml as fields of a page: what is typed replaces them, what is empty stays."""

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from dlplora.app.commands import Commands, shown

BALANCE = {"per_task": "Questions per task", "reworded": "Share in other wordings, 0 to 1"}


def field(label: str, now: Any = "") -> gr.Textbox:
    """Return an empty field that shows the present value; `dlplora set` checks what is typed."""
    return gr.Textbox("", label=label, placeholder=str(now), max_length=40, interactive=True)


def typed(fields: Mapping[str, str]) -> list[str]:
    """Return PATH=VALUE for each path whose field is not empty."""
    return [f"{path}={value.strip()}" for path, value in fields.items() if value.strip()]


def apply(commands: Commands, values: Sequence[str]) -> list[str]:
    """Set values, if there are any; returns the command that did, as it is typed."""
    if not values:
        return []
    commands.edit("set", "--", *values)
    return [shown("set", *values)]
