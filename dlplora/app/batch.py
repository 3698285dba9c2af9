"""A file of questions and answers, answered by the server and scored item by item."""

import csv
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dlplora.app.html import mix_of
from dlplora.app.model_client import ModelClient, ServerError
from dlplora.data.items import BadRowError, Item, Reader
from dlplora.data.raw import BLANK, format_of
from dlplora.errors import DataError
from dlplora.evaluation.metrics import exact_match, rouge, wilson

_AT_ONCE = 8
HEAD = ("question", "expected", "answer", "exact match", "ROUGE-L", "adapters")


@dataclass(frozen=True)
class Answered:
    """One item with the answer it got; scores are fractions of 1, `adapters` in words."""

    question: str
    expected: tuple[str, ...]
    answer: str
    exact_match: float
    rouge_l: float
    adapters: str

    @property
    def row(self) -> list[object]:
        """The item as a line of the table."""
        expected = " | ".join(self.expected)
        return [
            self.question, expected, self.answer, self.exact_match, self.rouge_l, self.adapters
        ]  # fmt: skip


def read_file(file: Path, *, most: int) -> list[Item]:
    """Read the items of a raw file; `DataError` names the first bad one, or tells of too many."""
    found = format_of(file)
    reader = Reader("auto", text_cells=found.text_cells)
    rows = (row for rows in found.batches(file) for row in rows)
    items = []
    for number, row in enumerate(islice(rows, most + 1), start=1):
        if number > most:
            raise DataError(f"{file.name}: more than {most:,} {found.unit}s; split the file")
        if row is BLANK:
            continue
        try:
            items.append(reader.item(row))
        except BadRowError as error:
            raise DataError(f"{file.name}: {found.unit} {number} {error}") from error
    if not items:
        raise DataError(f"{file.name}: holds no {found.unit}s")
    return items


def answer_all(
    server: ModelClient, model: str | None, items: Sequence[Item], *, max_tokens: int
) -> Iterator[Answered]:
    """Answer items, several at once; yields them in order.

    What the server refuses is no answer: `adapters` tells why. `ServerError` if it is gone.
    """

    def answered(item: Item) -> Answered:
        try:
            text, told = _answer(server, model, item, max_tokens)
        except ServerError as error:
            server.served()  # raises if there is no server any more
            text, told = "", f"refused: {error}"
        return Answered(
            item.question,
            item.answers,
            text,
            exact_match=exact_match(text, item.answers),
            rouge_l=rouge(text, item.answers)["rougeL"],
            adapters=told,
        )

    threads = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield from threads.map(answered, items)
    finally:  # who has left waits for no answer
        threads.shutdown(wait=False, cancel_futures=True)


def _answer(server: ModelClient, model: str | None, item: Item, max_tokens: int) -> tuple[str, str]:
    """Return the answer to an item, and by which adapters it was written."""
    if item.options is not None:
        scored = server.score(model, item.question, item.options)
        return scored["best"], mix_of(scored["route"]["adapters"])
    reply = server.answer(model, item.question, max_completion_tokens=max_tokens)
    return reply.text, "; ".join(dict.fromkeys(mix_of(part["adapters"]) for part in reply.parts))


def summary_of(answered: Sequence[Answered]) -> str:
    """Tell the scores of all, the proportion with its 95 % interval."""
    n = len(answered)
    right = sum(one.exact_match for one in answered)
    low, high = wilson(right, n)
    rouge = sum(one.rouge_l for one in answered) / n
    return (
        f"{n} items: exact match {right / n:.3f} (95 % interval {low:.3f} to {high:.3f}), "
        f"ROUGE-L {rouge:.3f}"
    )


def write_csv(file: Path, answered: Sequence[Answered]) -> None:
    """Write the table of all items."""
    with file.open("w", encoding="utf-8", newline="") as written:
        writer = csv.writer(written)
        writer.writerow(HEAD)
        writer.writerows(one.row for one in answered)
