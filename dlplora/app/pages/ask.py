"""The page Ask: a chat with its routes, systems side by side, and more ways to ask."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gradio as gr

from dlplora.app.commands import shown
from dlplora.app.context import Context
from dlplora.app.guard import Changes, guarded
from dlplora.app.html import table
from dlplora.app.model_client import Reply, Served
from dlplora.app.notice import Notice, header, html
from dlplora.app.pages.answering import Answering, asked, serving, settings, user, words
from dlplora.app.pages.ask_file import file_tab
from dlplora.app.pages.ask_more import mix_tab, options_tab
from dlplora.errors import GenerationError

_MOST_SIDES = 8
_SECONDS = 5.0  # between two looks at what is served
_MANY = "Several questions in one text are answered one by one, each by its own adapters."


class AskPage:
    """Everything that the model's server answers."""

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        header("Ask", "Nobody names the task: a router reads the text and chooses the adapters.")
        self._answering = answering = Answering(context)
        with gr.Tabs():
            with gr.Tab("Chat"):
                self._chat()
            with gr.Tab("Side by side"):
                self._side_by_side()
            with gr.Tab("Mix"):
                self._mixed = mix_tab(answering)
            with gr.Tab("Options"):
                options_tab(answering)
            with gr.Tab("File"):
                file_tab(answering, files=context.files)
        known = gr.State(None)
        chosen = [answering.model, self._sides, self._mixed]
        look = guarded(self._look, answering.state)
        parts = [answering.state, known, *chosen]
        self._known = known
        demo.load(look, [known, *chosen], parts, show_progress="hidden")
        gr.Timer(_SECONDS).tick(look, [known, *chosen], parts, show_progress="hidden")

    def _look(
        self, known: Served | None, model: str | None, sides: Sequence[str], mixed: Sequence[str]
    ) -> Changes:
        """Tell what is served; where that is new, offer it, and keep what is chosen."""
        answering = self._answering
        served = answering.served()
        if served == known:
            return {answering.state: serving(served)}
        names, adapters = [*served.systems, *served.adapters], list(served.adapters)
        kept = [name for name in sides or () if name in names]
        weighted = [name for name in mixed or () if name in adapters]
        return {
            answering.state: serving(served),
            self._known: served,
            answering.model: gr.Dropdown(names, value=model if model in names else names[0]),
            self._sides: gr.CheckboxGroup(names, value=kept or names[:2]),
            self._mixed: gr.Dropdown(adapters, value=weighted or adapters[:2]),
        }

    def _chat(self) -> None:
        gr.Markdown(_MANY)
        self._dialog = gr.Chatbot(
            label="Chat",
            height=340,
            render_markdown=False,
            buttons=["copy"],
            placeholder="Type a question below.",
        )
        self._routes = html()
        with gr.Row():
            self._text = text = gr.Textbox(
                label="Question",
                placeholder="Today I paint. Yesterday I",
                info="Enter sends, Shift and Enter begin a new line",
                max_lines=8,
                scale=4,
                min_width=260,
            )
            with gr.Column(min_width=120):
                send = gr.Button("Send", variant="primary")
                stop = gr.Button("Stop")
                clear = gr.Button("New chat")
        self._chatting = notice = Notice(shown("generate", "--trace", text="…"))
        answer = gr.on(
            [send.click, text.submit],
            notice.streamed(self._answer),
            [text, self._dialog, *self._answering.inputs],
            [*notice.outputs, text, self._dialog, self._routes],
            show_progress="hidden",
        )
        stop.click(None, cancels=[answer])
        emptied = [self._dialog, self._routes]
        clear.click(lambda: ([], ""), None, emptied, cancels=[answer])

    def _answer(
        self, text: str, turns: Sequence[Any], model: str, tokens: float, temperature: float
    ) -> Iterator[Changes]:
        question, answering = asked(text), self._answering
        served = answering.served()
        messages = [*map(_turn, turns), *user(question)]
        yield {self._text: "", self._dialog: messages, self._routes: ""}
        for reply in answering.server.stream(model, messages, **settings(tokens, temperature)):
            yield {
                self._dialog: [*messages, {"role": "assistant", "content": reply.text}],
                self._routes: answering.passages(reply),
            }
        more = [*served.words(model), *words(tokens, temperature), "--trace"]
        command = shown("generate", *more, text=question)
        if turns:  # the command line asks no chats
            told = settings(tokens, temperature)
            command = answering.server.typed(model, messages, **told)
        yield {self._chatting.command: command}

    def _side_by_side(self) -> None:
        self._sides = gr.CheckboxGroup([], label="Systems and adapters")
        text = gr.Textbox(label="Question", max_lines=8)
        ask = gr.Button("Ask all", variant="primary")
        notice = Notice(shown("generate", "--compare", "base,ensemble", text="…"))
        answering = self._answering

        def compare(
            text: str, models: Sequence[str], _: str, tokens: float, temperature: float
        ) -> Iterator[Changes]:
            question, served = asked(text), answering.served()
            if not 1 <= len(models) <= _MOST_SIDES:
                raise GenerationError(f"choose 1 to {_MOST_SIDES} of them; found {len(models)}")
            told = settings(tokens, temperature)

            def whole(model: str) -> Reply:
                return answering.server.answer(model, question, **told)

            rows: list[list[Any]] = []
            threads = ThreadPoolExecutor(_MOST_SIDES)
            try:
                for model, reply in zip(models, threads.map(whole, models), strict=True):
                    rows.append([model, answering.passages(reply)])
                    yield {notice.found: table(["by", "answer"], rows, title="Answers", empty="")}
            finally:  # who has left waits for no answer
                threads.shutdown(wait=False, cancel_futures=True)
            named = ",".join(served.words(model)[1] for model in models)
            more = ["--compare", named, *served.folder_words, *words(tokens, temperature)]
            yield {notice.command: shown("generate", *more, text=question)}

        gr.on(
            [ask.click, text.submit],
            notice.streamed(compare),
            [text, self._sides, *answering.inputs],
            notice.outputs,
        )


def _turn(message: Mapping[str, Any]) -> dict[str, str]:
    """Return a turn of the chat as the server takes it; the page keeps texts as parts."""
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"role": message["role"], "content": text}
