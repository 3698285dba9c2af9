"""Where a page tells how the press of a button ended, and which command does the same."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from dlplora.app import guard
from dlplora.app.guard import Changes
from dlplora.app.html import said


class Notice:
    """A line for results and mistakes, what was found, and the command that does the same.

    Args:
        command: The command as it stands before anything is pressed.
    """

    def __init__(self, command: str) -> None:
        self.line = html()
        self.found = html()
        self.command = gr.Code(
            command,
            language="shell",
            label="The same on the command line",
            interactive=False,
            lines=1,
        )

    @property
    def outputs(self) -> list[Any]:
        """The components that results change."""
        return [self.line, self.found, self.command]

    def good(self, text: str, command: str) -> Changes:
        """Tell that something was done, and by which command."""
        return {self.line: said(text, "good"), self.command: command}

    def bad(self, text: str, command: str) -> Changes:
        """Tell what is wrong, and which command tells it, too."""
        return {self.line: said(text, "error"), self.command: command}

    def guarded(self, handler: Callable[..., Changes]) -> Callable[..., Changes]:
        """Show an error of the handler in the line."""
        return guard.guarded(handler, self.line, self.found)

    def streamed(self, handler: Callable[..., Iterator[Changes]]) -> Callable[..., Any]:
        """Show an error of a handler that yields in the line."""
        return guard.streamed(handler, self.line, self.found)


def html(value: str = "") -> gr.HTML:
    """Return a place for HTML."""
    return gr.HTML(value, padding=False)


def header(title: str, text: str) -> None:
    """Begin a page by what it is for."""
    gr.Markdown(f"# {title}\n{text}")
