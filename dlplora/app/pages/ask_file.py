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

    answer = _Answering(answering, notice, download, files).answer
    work = ask.click(
        notice.streamed(answer),
        [upload, *answering.inputs[:2]],
        [*notice.outputs, download],
        show_progress="hidden",
    )
    stop.click(None, cancels=[work])


class _Answering:
    """What the button does."""

    def __init__(
        self, answering: Answering, notice: Notice, download: gr.File, files: Path
    ) -> None:
        self._answering = answering
        self._notice = notice
        self._download = download
        self._files = files

    def answer(self, file: str | None, model: str | None, tokens: float) -> Iterator[Changes]:
        """Answer the items of a file; the table so far is shown, and offered now and then."""
        if file is None:
            raise GenerationError("upload a file first")
        self._answering.served()  # or says why nothing is
        server, limit = self._answering.server, int(tokens)
        items = read_file(Path(file), most=_MOST_ITEMS)
        first = server.typed(model, user(items[0].question), max_completion_tokens=limit)
        command = f"# the first item\n{first}"
        yield {self._download: gr.File(visible=False), self._notice.command: command}
        written = Path(tempfile.mkdtemp(dir=self._files)) / "answers.csv"
        done: list[Answered] = []
        shown_at, offered_at = 0.0, time.monotonic()
        for one in answer_all(server, model, items, max_tokens=limit):
            done.append(one)
            is_whole, now = len(done) == len(items), time.monotonic()
            if not is_whole and now < shown_at + _SECONDS:
                continue
            shown_at = now
            changes = self._shown(done, len(items))
            if is_whole or now > offered_at + _OFFER_SECONDS:  # each is a copy
                offered_at = now
                write_csv(written, done)
                changes[self._download] = gr.File(str(written), visible=True)
            yield changes

    def _shown(self, done: Sequence[Answered], num_items: int) -> dict[Any, Any]:
        line = f"{len(done)} of {num_items} answered. {summary_of(done)}"
        kind = "good" if len(done) == num_items else "note"
        return {self._notice.line: said(line, kind), self._notice.found: _table(done)}


def _table(done: Sequence[Answered]) -> Markup:
    rows = [one.row for one in done[-_SHOWN_ITEMS:]]
    cut = f"The last {_SHOWN_ITEMS}; the table has all." if len(done) > len(rows) else ""
    return Markup("{}").format(cut) + table(HEAD, rows, title="Items", empty="")
