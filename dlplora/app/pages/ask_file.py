"""A part of the page Ask: a file of questions and answers, answered and scored."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import gradio as gr
from markupsafe import Markup

from dlplora.app.batch import HEAD, Answered, answer_all, read_file, summary_of, write_csv
from dlplora.app.html import said, table
from dlplora.app.notice import Changes, Notice
from dlplora.app.pages.answering import Answering, user
from dlplora.data.raw import FORMATS
from dlplora.errors import GenerationError

_MOST_ITEMS = 2000
_SHOWN_ITEMS = 200


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
    notice = Notice(answering.server.typed("", user("…"), {}))

    def answer(file: str | None, model: str, tokens: float) -> Iterator[Changes]:
        if file is None:
            raise GenerationError("upload a file first")
        items = read_file(Path(file), most=_MOST_ITEMS)
        done: list[Answered] = []
        for one in answer_all(answering.server, model, items, max_tokens=int(tokens)):
            done.append(one)
            told = f"{len(done)}/{len(items)} answered. {summary_of(done)}"
            yield {notice.line: said(told), notice.found: _table(done)}
        table_file = Path(tempfile.mkdtemp(dir=files)) / "answers.csv"
        write_csv(table_file, done)
        yield {
            notice.line: said(summary_of(done), "good"),
            download: gr.File(str(table_file), visible=True),
        }

    work = ask.click(
        answering.streamed(notice, answer),
        [upload, *answering.inputs[:2]],
        [*notice.outputs, download],
        show_progress="hidden",
    )
    stop.click(None, cancels=[work])


def _table(done: Sequence[Answered]) -> Markup:
    return table(HEAD, [one.row for one in done[-_SHOWN_ITEMS:]], title="Items", empty="")
