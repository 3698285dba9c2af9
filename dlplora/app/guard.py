"""Show errors in one line on the page."""

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


def guarded(
    handler: Callable[..., Changes], line: gr.HTML, *emptied: gr.HTML
) -> Callable[..., Changes]:
    """Show an error of the handler in a line; besides, only what is `emptied` changes then."""

    @wraps(handler)
    def guarded(*values: Any) -> Changes:
        try:
            return handler(*values)
        except Exception as error:
            return {**dict.fromkeys(emptied, ""), line: told(error)}

    return guarded


def streamed(
    handler: Callable[..., Iterator[Changes]], line: gr.HTML, *emptied: gr.HTML
) -> Callable[..., Iterator[Changes]]:
    """Show an error of the handler in a line, also in the middle of an answer.

    The line, and what is `emptied`, are empty when it begins.
    """

    @wraps(handler)
    def streamed(*values: Any) -> Iterator[Changes]:
        try:
            yield dict.fromkeys((line, *emptied), "")
            yield from handler(*values)
        except Exception as error:
            yield {line: told(error)}

    return streamed


def drawn(handler: Callable[..., Markup]) -> Callable[..., Markup]:
    """Show an error of the handler in place of what it draws."""

    @wraps(handler)
    def drawn(*values: Any) -> Markup:
        try:
            return handler(*values)
        except Exception as error:
            return told(error)

    return drawn
