"""The HTML that pages show. Every text is escaped."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup

_SHADES = 6  # classes shade-1 … of the style sheet, for adapters


def said(text: str, kind: str = "note") -> Markup:
    """Tell how something ended, in one line; `kind` is note, good or error."""
    role = "alert" if kind == "error" else "status"
    return (
        Markup('<p class="said {}" role="{}">{}</p>').format(kind, role, text) if text else Markup()
    )


def link(text: str, address: str) -> Markup:
    """Return a link."""
    return Markup('<a href="{}">{}</a>').format(address, text)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str, empty: str) -> Markup:
    """Lay out rows under a head; without any, `empty` says what to do."""
    if not rows:
        return Markup('<p class="empty">{}</p>').format(empty)
    cells = Markup().join(Markup("<th scope=col>{}</th>").format(name) for name in head)
    lines = Markup().join(
        Markup("<tr>{}</tr>").format(Markup().join(map(_cell, row))) for row in rows
    )
    return Markup(
        '<div class="table" role="region" aria-label="{}" tabindex=0><table>'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(title, cells, lines)


def _cell(value: Any) -> Markup:
    if isinstance(value, Markup):
        return Markup("<td>{}</td>").format(value)
    if isinstance(value, bool) or value is None:
        return Markup("<td>{}</td>").format({True: "yes", False: "no", None: "–"}[value])
    if isinstance(value, float):
        return Markup("<td class=number>{}</td>").format(f"{value:.3f}")
    if isinstance(value, int):
        return Markup("<td class=number>{}</td>").format(f"{value:,}")
    return Markup("<td>{}</td>").format(value)


def local(time: datetime) -> Markup:
    """Write a time as the clocks here show it."""
    return Markup("<time>{}</time>").format(f"{time.astimezone():%Y-%m-%d %H:%M}")


def seconds(number: float | None) -> str | None:
    """Write how long something took, on one line."""
    return None if number is None else f"{number:.0f}\N{NO-BREAK SPACE}s"


def bar(percent: float, text: str) -> Markup:
    """Draw how far something is."""
    return Markup('<progress max=100 value="{}" aria-label="{}"></progress> {}').format(
        round(percent), text, text
    )


def log(lines: Sequence[str]) -> Markup:
    """Show the lines of a log."""
    return (
        Markup('<pre class="log" tabindex=0>{}</pre>').format("\n".join(lines))
        if lines
        else Markup()
    )


def confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Markup:
    """Draw how many texts of each task (rows) were sent to each adapter (columns)."""
    heads = Markup().join(Markup("<th scope=col>{}</th>").format(name) for name in labels)
    rows = []
    for label, row in zip(labels, counts, strict=True):
        whole = max(sum(row), 1)
        cells = Markup().join(
            Markup('<td class=share style="--share: {}">{}</td>').format(
                round(count / whole, 3), count or ""
            )
            for count in row
        )
        rows.append(Markup("<tr><th scope=row>{}</th>{}</tr>").format(label, cells))
    return Markup(
        '<div class="table confusion" role="region" aria-label="Confusion matrix" tabindex=0>'
        "<table>"
        "<caption>Task (rows) and first adapter (columns), of the validation texts</caption>"
        "<thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(heads, Markup().join(rows))


def mix_of(adapters: Mapping[str, float] | None) -> str:
    """Name a mix: adapters with weights, the base model, or weights that differ by token."""
    if adapters is None:
        return "weights by token"
    if not adapters:
        return "base model"
    ranked = sorted(adapters.items(), key=lambda pair: -pair[1])
    return " + ".join(
        name if weight == 1 and len(ranked) == 1 else f"{name} {weight:.2g}"
        for name, weight in ranked
    )


class Palette:
    """One of six shades for each adapter, in the order in which they are met; 0 is that of none."""

    def __init__(self) -> None:
        self._met: dict[str, int] = {}

    def shade(self, adapters: Mapping[str, float] | None) -> int:
        """Return the shade of a mix: that of its heaviest adapter."""
        if not adapters:
            return 0
        heaviest = max(adapters, key=lambda name: adapters[name])
        return self._met.setdefault(heaviest, len(self._met)) % _SHADES + 1


def passages(parts: Sequence[Mapping[str, Any]], palette: Palette) -> Markup:
    """Show what was written by which adapters, by colour and in words."""
    if not parts:
        return Markup()
    shades = {mix_of(part["adapters"]): palette.shade(part["adapters"]) for part in parts}
    told = Markup().join(_passage(part, shades) for part in parts)
    legend = Markup().join(
        Markup('<li><span class="swatch shade-{}"></span>{}</li>').format(shade, mix)
        for mix, shade in shades.items()
    )
    return Markup(
        '<div class="passages" role="region" aria-label="Adapters of the answer">{}'
        '<ul class="legend" aria-label="Legend">{}</ul></div>'
    ).format(told, legend)


def _passage(part: Mapping[str, Any], shades: Mapping[str, int]) -> Markup:
    mix, sure, question = mix_of(part["adapters"]), part["confidence"], part["question"]
    return Markup('<p>{}<mark class="shade-{}">{}</mark> <small>{}</small></p>').format(
        Markup("<small>{}</small><br>").format(question) if question else "",
        shades[mix],
        part["text"].strip() or "(nothing)",
        mix if sure is None else f"{mix}, confidence {sure:.2f}",
    )
