"""Two parts of the page Ask: adapters with weights set by hand, and options scored."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.commands import shown
from dlplora.app.guard import Changes
from dlplora.app.html import table
from dlplora.app.notice import Notice
from dlplora.app.pages.answering import Answering, asked, settings, user
from dlplora.errors import GenerationError

_MOST_SLIDERS = 12


def mix_tab(answering: Answering) -> gr.Dropdown:
    """Set the weights of adapters by sliders; returns the choice of adapters."""
    gr.Markdown("Set the weights of adapters; the router is skipped.")
    chosen = gr.Dropdown([], label="Adapters", multiselect=True, max_choices=_MOST_SLIDERS)
    text = gr.Textbox(label="Question", lines=2, interactive=True)

    def sliders(names: Sequence[str] | None) -> None:
        names = names or []
        weights = [
            gr.Slider(0, 2, 1, step=0.05, label=f"Weight of {name}", interactive=True)
            for name in names
        ]
        ask = gr.Button("Answer by this mix", variant="primary")

        def mixed(
            text: str, model: str, tokens: float, temperature: float, *values: float
        ) -> Iterator[Changes]:
            mix = {name: value for name, value in zip(names, values, strict=True) if value}
            if not mix:
                raise GenerationError("choose an adapter, and a weight above 0")
            messages, told = user(asked(text)), settings(tokens, temperature)
            answering.served()  # or says why nothing is
            for reply in answering.server.stream(model, messages, mix=mix, **told):
                shown_text = Markup("<p>{}</p>").format(reply.text)
                yield {notice.found: answering.passages(reply) or shown_text}
            yield {notice.command: answering.server.typed(model, messages, mix=mix, **told)}

        ask.click(
            notice.streamed(mixed),
            [text, *answering.inputs, *weights],
            notice.outputs,
        )

    gr.render(inputs=chosen)(sliders)
    notice = Notice(answering.server.typed("", user("…"), mix={"capitals": 0.7, "rivers": 0.3}))
    return chosen


def options_tab(answering: Answering) -> None:
    """Score the options of a multiple-choice question."""
    gr.Markdown("A multiple-choice question: which option is the likeliest answer?")
    text = gr.Textbox(label="Question", lines=2)
    options = gr.Textbox(label="Options, one a line", lines=3)
    weigh = gr.Button("Score", variant="primary")
    notice = Notice(shown("score", "--option", "Valid", "--option", "Invalid", text="…"))

    def score(text: str, lines: str, model: str) -> Changes:
        question, served = asked(text), answering.served()
        given = [line.strip() for line in lines.splitlines() if line.strip()]
        found = answering.server.score(model, question, given)
        rows = [[row["option"], _mean(row), row["tokens"]] for row in found["options"]]
        heads = ["option", "mean log-likelihood of a token", "tokens"]
        words = [word for option in given for word in ("--option", option)]
        command = shown("score", *words, *served.words(model), text=question)
        return {
            **notice.good(f"The likeliest is {found['best']!r}.", command),
            notice.found: table(heads, rows, title="Options", empty=""),
        }

    inputs = [text, options, answering.model]
    weigh.click(notice.guarded(score), inputs, notice.outputs)


def _mean(row: Mapping[str, Any]) -> float | None:
    """Return the mean log-likelihood of a token; None if it is not finite."""
    return None if row["logprob"] is None else float(row["logprob"] / row["tokens"])
