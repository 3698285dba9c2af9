"""A part of the page Ask: a file of questions and answers, answered and scored."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.batch import HEAD, Answered, answer_all, read_file, summary_of, write_csv
from dlplora.app.guard import Changes
from dlplora.app.html import said, table
from dlplora.app.notice import Notice
from dlplora.app.pages.answering import Answering, user
from dlplora.data.raw import FORMATS
from dlplora.errors import GenerationError

_MOST_ITEMS = 2000
_SHOWN_ITEMS = 200
_SECONDS = 1.0  # between two tables that are shown
_OFFER_SECONDS = 20.0  # between two that can be downloaded


def file_tab(answering: Answering, *, files: Path) -> None:
    """Answer a file; `files` is the folder for the table to download."""
    gr.Markdown(
        f"A file of questions and answers, at most {_MOST_ITEMS:,}, is answered item by item and "
        f"scored."
    )
    upload = gr.File(
        label=f"Questions and answers ({', '.join(FORMATS)})", file_types=list(FORMATS), height=140
    )
    with gr.Row():
        ask = gr.Button("Answer all", variant="primary")
        stop = gr.Button("Stop")
    download = gr.File(label="The table (CSV)", interactive=False, visible=False, height=90)
    notice = Notice(answering.server.typed("", user("…")))

    def answer(file: str | None, model: str, tokens: float) -> Iterator[Changes]:
        if file is None:
            raise GenerationError("upload a file first")
        answering.served()  # or says why nothing is
        items = read_file(Path(file), most=_MOST_ITEMS)
        first = answering.server.typed(
            model, user(items[0].question), max_completion_tokens=int(tokens)
        )
        yield {download: gr.File(visible=False), notice.command: f"# the first item\n{first}"}
        written = Path(tempfile.mkdtemp(dir=files)) / "answers.csv"
        done: list[Answered] = []
        shown_at, offered_at = 0.0, time.monotonic()
        for one in answer_all(answering.server, model, items, max_tokens=int(tokens)):
            done.append(one)
            if len(done) < len(items) and time.monotonic() < shown_at + _SECONDS:
                continue
            shown_at = time.monotonic()
            write_csv(written, done)  # a person may stop it, and keeps what there is
            is_whole = len(done) == len(items)
            line = f"{len(done)} of {len(items)} answered. {summary_of(done)}"
            changes: dict[Any, Any] = {
                notice.line: said(line, "good" if is_whole else "note"),
                notice.found: _table(done),
            }
            if is_whole or shown_at > offered_at + _OFFER_SECONDS:  # each is a copy
                offered_at = shown_at
                changes[download] = gr.File(str(written), visible=True)
            yield changes

    work = ask.click(
        notice.streamed(answer),
        [upload, *answering.inputs[:2]],
        [*notice.outputs, download],
        show_progress="hidden",
    )
    stop.click(None, cancels=[work])


def _table(done: Sequence[Answered]) -> Markup:
    rows = [one.row for one in done[-_SHOWN_ITEMS:]]
    cut = f"The last {_SHOWN_ITEMS}; the table has all." if len(done) > len(rows) else ""
    return Markup("{}").format(cut) + table(HEAD, rows, title="Items", empty="")
