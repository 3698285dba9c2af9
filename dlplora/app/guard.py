"""What keeps mistakes in their place: one line on the page, never a page that stands still."""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.html import said
from dlplora.edge import as_mistake
from dlplora.errors import one_line

logger = logging.getLogger(__name__)
Changes = Mapping[Any, Any]  # new values by component; those of the others stay


def told(error: Exception) -> Markup:
    """Tell an error in one line; what is no mistake of a user is logged with its trace."""
    mistake = as_mistake(error)
    if mistake is None:
        logger.warning("a page failed", exc_info=error)
    return said(one_line(error) if mistake is None else str(mistake), "error")


def guarded(handler: Callable[..., Changes], line: gr.HTML) -> Callable[..., Changes]:
    """Let an error stand in a line; nothing else of the page changes then."""

    @wraps(handler)
    def guarded(*values: Any) -> Changes:
        try:
            return handler(*values)
        except Exception as error:
            return {line: told(error)}

    return guarded


def streamed(
    handler: Callable[..., Iterator[Changes]], line: gr.HTML
) -> Callable[..., Iterator[Changes]]:
    """Let an error stand in a line, also in the middle of an answer."""

    @wraps(handler)
    def streamed(*values: Any) -> Iterator[Changes]:
        try:
            yield {line: ""}
            yield from handler(*values)
        except Exception as error:
            yield {line: told(error)}

    return streamed


def drawn(handler: Callable[..., Markup]) -> Callable[..., Markup]:
    """Let an error stand where a part of the page would."""

    @wraps(handler)
    def drawn(*values: Any) -> Markup:
        try:
            return handler(*values)
        except Exception as error:
            return told(error)

    return drawn
