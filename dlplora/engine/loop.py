"""The loop that writes: one token a step for every sequence, whose places are filled again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from dlplora.engine.answers import Piece, Request
from dlplora.engine.batch import Batch
from dlplora.engine.writing import Writing
from dlplora.errors import DlpLoraError
from dlplora.lora.mix import Row
from dlplora.records.routes import Route
from dlplora.sampling import next_tokens


@dataclass
class Group:
    """Answers in the making whose sequences share one batch, row by row."""

    batch: Batch
    writings: list[Writing]


def run(
    groups: list[Group],
    waiting: Iterator[tuple[int, Request]],
    *,
    places: int,
    begin: Callable[[Sequence[tuple[int, Request]]], tuple[list[Group], list[Piece]]],
    read_again: Callable[[Sequence[Writing]], Group],
    next_route: Callable[[Writing], tuple[Route, Row]],
) -> Iterator[Piece]:
    """Write until no answer is open and no request waits; yield what is written, in turns.

    Requests enter together when a quarter of the places is free: a prompt read alone costs nearly
    as much as several. There is one group, unless the rows of a model's cache cannot be joined.
    An error of one request ends that one alone.
    """
    is_waiting = True
    while True:
        free = places - sum(len(group.writings) for group in groups)
        if is_waiting and (not groups or 4 * free >= places):
            entering = list(islice(waiting, free))
            is_waiting = len(entering) == free
            if entering:
                begun, refused = begin(entering)
                yield from refused
                for group in begun:
                    _add(groups, group)
        if not groups and not is_waiting:
            return
        going_on: list[Group] = []
        for group in groups:
            texts = _choose_tokens(group)
            rereading = _route_begun(group.writings, next_route)
            for writing, text in zip(group.writings, texts, strict=True):
                answer = writing.answer() if writing.ending else None
                if text or not writing.is_open:
                    yield Piece(writing.number, text, writing.route, answer, writing.error)
            for part in _go_on(group, rereading, read_again):
                _add(going_on, part)
        groups = going_on


def _choose_tokens(group: Group) -> list[str]:
    """Append the next token of every sequence, and return the texts that are certain by it."""
    samplers = [writing.sampler for writing in group.writings]
    ids = [writing.ids for writing in group.writings]
    tokens = next_tokens(samplers, ids, group.batch.logits_BV)
    return [
        writing.cancel() if writing.request.cancelled.is_set() else writing.accept(token)
        for writing, token in zip(group.writings, tokens, strict=True)
    ]


def _route_begun(
    writings: Sequence[Writing], next_route: Callable[[Writing], tuple[Route, Row]]
) -> list[Writing]:
    """Route the sentences that have begun; return what is to be read again by its new route."""
    rereading = []
    for writing in writings:
        if writing.is_open and writing.begins and writing.policy != "route_once":
            before = writing.route
            try:
                writing.reroute(*next_route(writing))
            except DlpLoraError as error:
                writing.error = error
            else:
                if writing.policy == "refill" and writing.route.mix != before.mix:
                    rereading.append(writing)
    return rereading


def _go_on(
    group: Group,
    rereading: Sequence[Writing],
    read_again: Callable[[Sequence[Writing]], Group],
) -> Iterator[Group]:
    """Let finished sequences go, and predict the next tokens of the others."""
    staying = [
        row
        for row, writing in enumerate(group.writings)
        if writing.is_open and writing not in rereading
    ]
    if staying:
        writings = [group.writings[row] for row in staying]
        group.batch.keep(staying)
        group.batch.reroute(
            [writing.route for writing in writings], [writing.row for writing in writings]
        )
        group.batch.step([writing.ids[-1] for writing in writings])
        yield Group(group.batch, writings)
    if rereading:
        yield read_again(rereading)


def _add(groups: list[Group], group: Group) -> None:
    """Join a group to the first one if their caches allow it."""
    if groups and groups[0].batch.can_join and group.batch.can_join:
        groups[0].batch.join(group.batch)
        groups[0].writings += group.writings
    else:
        groups.append(group)
