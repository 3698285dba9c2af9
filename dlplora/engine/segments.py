"""The questions of a prompt: where a text is cut so that each part can be routed by itself.

A text with a numbered list is cut at its numbers if the router is sure of each question; any other
one behind sentences, clauses and lines, where the router is about as sure of the parts as of the
whole, and sends neighbours to different adapters.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

from dlplora.errors import GenerationError
from dlplora.records.routes import Route

MAX_SEGMENTS = 32
_MAX_CLAUSES = 24  # of a text that is cut without numbers; longer ones are left whole
_WIDEST = 8  # clauses in one of its questions
_GAIN = 0.1  # of each cut without a number, in nats of confidence (docs/log.md)
_CLAUSE = re.compile(r"(?<=[.?!:;\"”])(?=\s)|(?<=[\n。？！])")
_TINY = 1e-9
_LEAST = 0.5  # confidence in each question of a numbered list (docs/log.md)
_LONGEST = 20_000  # characters of a text that is looked at; longer ones are left whole
_CHINESE = "一二三四五六七八九"
# What may stand before a question at the beginning of a line, each with the part that counts up.
_MARKERS = [
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"(?:^|(?<=\s))[\(（]?(?P<digits>\d{1,3})[\)）.．:：、](?:\s+|(?<=[．：、）])|$)",
        r"(?:^[#* \t]{0,8}|(?<=\s))(?:(?i:question|item|task|problem)|Q)[ \t]{0,2}"
        r"(?P<digits>\d{1,3})[\)）.．:：、]?\*{0,2}(?:\s+|$)",
        r"(?:^|(?<=\s))[\(（]?(?P<letters>[a-zA-Z])[\)）](?:\s+|$)",
        r"^[ \t]{0,8}(?P<letters>[a-zA-Z])[.．](?:\s+|$)",
        r"(?P<circled>[①-⑳⑴-⒇])\s*",
        rf"(?:^|(?<=\s))第?[\(（]?(?P<chinese>[{_CHINESE}]?十[{_CHINESE}]?|[{_CHINESE}])"
        rf"(?:[\)）、.．:：]|题[：:、.]?)\s*",
        r"^[ \t]{0,8}(?P<bullets>[-*+•])[ \t]+",
    )
]
Look = Callable[[Sequence[str]], Sequence[Route]]


@dataclass(frozen=True)
class Segment:
    """One question of a prompt, and the number that stands before it, if there is one."""

    text: str
    label: str = ""


def segments_of(text: str, look: Look) -> tuple[Segment, ...]:
    """Return the questions of a text, in order: the text alone if it is to be left whole.

    `look` returns the router's route for each of some texts. If its routes have no confidence,
    every list whose numbers begin lines is one of questions, and nothing else is cut. Raises
    `GenerationError` if there are more than `MAX_SEGMENTS`.
    """
    if len(text) > _LONGEST:
        return (Segment(text),)
    if not (listed := numbered(text)):
        return _cut(text, look)
    before, questions = listed
    asked = questions[: MAX_SEGMENTS + 1]
    *parts, whole = (route.confidence for route in look([*_texts(asked), before or text]))
    sure = [part for part in parts if part is not None]
    if whole is None or len(sure) < len(parts):
        is_list = all(f"\n{one.label}" in f"\n{text}" for one in questions)
    else:  # a list behind a text that the router knows is that question's own
        is_list = min(sure) >= _LEAST and (not before or whole < min(sure))
    if is_list and len(questions) > MAX_SEGMENTS:
        raise GenerationError(
            f"the prompt holds {len(questions)} questions, expected at most {MAX_SEGMENTS}"
        )
    return questions if is_list else (Segment(text),)


def _texts(segments: Sequence[Segment]) -> list[str]:
    return [segment.text for segment in segments]


def numbered(text: str) -> tuple[str, tuple[Segment, ...]] | None:
    """Return what stands before a list of questions, and these; None if there is no list.

    Numbers, letters and Chinese numerals count up from the first; a list has two items or more.
    """
    chains = [chain for marker in _MARKERS if len(chain := _chain(marker, text)) > 1]
    if not chains:
        return None
    marks = min(chains, key=lambda chain: (chain[0].start(), -len(chain)))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    if not text[marks[-1].end() :].strip():  # a number that nothing follows
        del marks[-1], ends[-1]
    items = tuple(
        Segment(text[mark.end() : end].strip(), mark.group().strip("#* \t\n"))
        for mark, end in zip(marks, ends, strict=True)
    )
    if len(items) < 2 or not all(one.text for one in items):
        return None
    return text[: marks[0].start()].strip(), items


def _chain(marker: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """Return the matches that count up from the first; of bullets, all."""
    chain: list[re.Match[str]] = []
    for match in marker.finditer(text):
        kind, label = next((k, v) for k, v in match.groupdict().items() if v)
        if kind == "bullets" or _value(kind, label) == len(chain) + 1:
            chain.append(match)
    return chain


def _value(kind: str, label: str) -> int:
    if kind == "digits":
        return int(label)
    if kind == "letters":
        return ord(label.lower()) - ord("a") + 1
    if kind == "circled":
        return int(unicodedata.numeric(label))
    tens, ten, ones = label.rpartition("十")
    value = 10 * (_CHINESE.index(tens) + 1 if tens else 1) if ten else 0
    return value + (_CHINESE.index(ones) + 1 if ones else 0)


def _cut(text: str, look: Look) -> tuple[Segment, ...]:
    """Cut a text by dynamic programming over its clauses.

    The cuts have the greatest sum of the logarithms of the parts' confidence, plus a gain for each
    cut. Neighbours have different first adapters: what is one adapter's may be one question.
    """
    clauses = [clause for clause in _CLAUSE.split(text) if clause.strip()]
    size = len(clauses)
    if not 1 < size <= _MAX_CLAUSES:
        return (Segment(text),)
    spans = [
        (first, last)
        for first in range(size)
        for last in range(first + 1, size + 1)
        if last - first <= _WIDEST or last - first == size
    ]
    parts = ["".join(clauses[first:last]).strip() for first, last in spans]
    # By the end of a part and its adapter: the best sum up to there, and the parts.
    best: dict[tuple[int, str | None], tuple[float, tuple[str, ...]]] = {(0, None): (0.0, ())}
    for (first, last), part, route in sorted(
        zip(spans, parts, look(parts), strict=True), key=lambda row: row[0][1]
    ):
        if route.confidence is None:
            return (Segment(text),)
        gain = log(max(route.confidence, _TINY)) + _GAIN
        for (end, adapter), (before, earlier) in list(best.items()):
            if end != first or (end and adapter == route.first):
                continue
            found = before + gain, (*earlier, part)
            key = last, route.first
            best[key] = max(best.get(key, found), found)
    _, cut = max(row for (end, _), row in best.items() if end == size)
    return tuple(map(Segment, cut)) if len(cut) > 1 else (Segment(text),)
