"""Answers, routes and scores in the terminal."""

import sys
from collections.abc import Iterator, Mapping
from unicodedata import category

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlplora.engine.answers import Answer, Part, Piece
from dlplora.records.routes import Route
from dlplora.records.scores import OptionScores

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
_BAR = 32
_LEAST = 0.01  # of weights that are shown one by one


class _Palette:
    """One colour for each first adapter, in the order in which they are met."""

    def __init__(self) -> None:
        self._met: dict[str, str] = {}

    def style(self, route: Route) -> str:
        """Return the colour of a route; the base model has none."""
        if not route.adapters:
            return "dim"
        first = max(route.mix, key=lambda pair: pair[1])[0]
        return self._met.setdefault(first, _COLOURS[len(self._met) % len(_COLOURS)])


def stream(pieces: Iterator[Piece], *, trace: bool) -> None:
    """Print an answer while it is written; with `trace`, then its sentences or questions."""
    console, palette = Console(highlight=False), _Palette()
    for piece in pieces:
        if trace:
            console.print(Text(piece.text, palette.style(piece.route)), end="", soft_wrap=True)
        else:
            sys.stdout.write(_harmless(piece.text) if sys.stdout.isatty() else piece.text)
        sys.stdout.flush()
        if piece.answer is not None:
            console.print()
            if piece.answer.ending == "length":  # a reader might take it for the model's doing
                told = f"ended at {piece.answer.num_tokens} tokens; --max-new-tokens allows more"
                Console(stderr=True, style="dim").print(f"({told})")
            if trace:
                console.print(_passages(piece.answer, palette))


def side_by_side(answers: Mapping[str, Answer], *, trace: bool) -> None:
    """Print the answers of several systems beside one another."""
    table, palette = Table(show_lines=True), _Palette()
    table.add_column("system", no_wrap=True)
    table.add_column("answer", overflow="fold")
    table.add_column("adapters", overflow="fold")
    for name, answer in answers.items():
        text = Text()
        is_split = any(part.question is not None for part in answer.parts)
        for place, passage in enumerate(answer.parts if is_split else answer.sentences):
            line = "\n" if is_split and place else ""
            text.append(line + passage.text, palette.style(passage.route))
        routes = dict.fromkeys(_told(sentence.route) for sentence in answer.sentences)
        table.add_row(Text(name), text if trace else Text(answer.text), Text("\n".join(routes)))
    Console().print(table)


def bars(probabilities: Mapping[str, float], chosen: Route, *, threshold: float) -> None:
    """Draw the probabilities of tasks, those of chosen adapters in colour; then the route.

    Routes of less confidence than the `threshold` went to the base model.
    """
    table = Table(box=None, pad_edge=False, show_header=False)
    for task, probability in sorted(probabilities.items(), key=lambda pair: -pair[1]):
        style = "bold cyan" if task in chosen.adapters else "dim"
        filled = round(probability * _BAR)
        bar = "█" * filled + "·" * (_BAR - filled)
        table.add_row(Text(task, style), Text(bar, style), f"{probability:6.1%}")
    if probabilities:
        Console().print(table)
    sure = "" if chosen.confidence is None else f", confidence {chosen.confidence:.3f}"
    if chosen.confidence is not None and chosen.confidence < threshold:
        sure += f" (an adapter answers from {threshold:.3f} on)"
    Console().print(Text(f"route: {_told(chosen)}{sure}"))


def options(scores: OptionScores, route: Route) -> None:
    """Print the options with their log-likelihoods, the best in colour."""
    table = Table(caption=f"by {_told(route)}", caption_justify="left")
    table.add_column("option")
    for head in ("tokens", "sum", "mean"):
        table.add_column(head, justify="right")
    rows = zip(scores.options, scores.tokens, scores.logprobs, strict=True)
    for text, tokens, logprob in rows:
        style = "bold cyan" if text == scores.best else ""
        figures = (str(tokens), f"{logprob:.3f}", f"{logprob / tokens:.3f}")
        table.add_row(Text(text), *figures, style=style)
    Console().print(table)


def _passages(answer: Answer, palette: _Palette) -> Table:
    """Lay out by which adapters each question of a split prompt, or each sentence, was answered."""
    is_split = any(part.question is not None for part in answer.parts)
    what = "question" if is_split else "sentence"
    table = Table(title=f"{what}s and their adapters", title_justify="left")
    for head in ["question", "answer"] if is_split else ["sentence"]:
        table.add_column(head, overflow="fold")
    table.add_column("adapters", overflow="fold")
    table.add_column("confidence", justify="right")
    for passage in answer.parts if is_split else answer.sentences:
        style = palette.style(passage.route)
        sure = passage.route.confidence
        table.add_row(
            *([Text(passage.question or "")] if isinstance(passage, Part) else []),
            Text(passage.text.strip(), style),
            Text(_told(passage.route), style),
            "" if sure is None else f"{sure:.3f}",
        )
    return table


def _harmless(text: str) -> str:
    """Show control characters, which could steer the terminal, instead of sending them."""
    return "".join(
        f"\\x{ord(letter):02x}" if category(letter) == "Cc" and letter not in "\n\t" else letter
        for letter in text
    )


def _told(route: Route) -> str:
    if route.per_token:
        return "chosen token by token"
    if not route.adapters:
        return "base model"
    told = [f"{weight:.2f} {name}" for name, weight in route.mix if weight >= _LEAST]
    if few := len(route.mix) - len(told):
        told.append(f"{few} of less than {_LEAST}")
    return " + ".join(told)
