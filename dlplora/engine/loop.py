"""The loop that writes: one token a step for every sequence, whose places are filled again."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from dlplora.engine.answers import Piece, Request
from dlplora.engine.batch import Batch
from dlplora.engine.writing import Writing
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
    begin: Callable[[Sequence[tuple[int, Request]]], Group],
    read_again: Callable[[Sequence[Writing]], Group],
    next_route: Callable[[Writing], Route],
) -> Iterator[Piece]:
    """Write until no answer is open and no request waits; yield what is written, in turns.

    Requests enter together when a quarter of the places is free: a prompt read alone costs nearly
    as much as several. There is one group, unless the rows of a model's cache cannot be joined.
    """
    is_waiting = True
    while True:
        free = places - sum(len(group.writings) for group in groups)
        if is_waiting and (not groups or 4 * free >= places):
            entering = list(islice(waiting, free))
            is_waiting = len(entering) == free
            if entering:
                _add(groups, begin(entering))
        if not groups:
            return
        going_on: list[Group] = []
        for group in groups:
            yield from _choose_tokens(group)
            for part in _go_on(group, read_again, next_route):
                _add(going_on, part)
        groups = going_on


def _choose_tokens(group: Group) -> Iterator[Piece]:
    """Append the next token of every sequence, and yield what became certain by it."""
    samplers = [writing.sampler for writing in group.writings]
    ids = [writing.ids for writing in group.writings]
    tokens = next_tokens(samplers, ids, group.batch.logits_BV)
    for writing, token in zip(group.writings, tokens, strict=True):
        is_cancelled = writing.request.cancelled.is_set()
        text = writing.cancel() if is_cancelled else writing.accept(token)
        answer = writing.answer() if writing.ending else None
        if text or answer:
            yield Piece(writing.number, text, writing.route, answer)


def _go_on(
    group: Group,
    read_again: Callable[[Sequence[Writing]], Group],
    next_route: Callable[[Writing], Route],
) -> Iterator[Group]:
    """Let finished sequences go, route begun sentences, and predict the tokens after."""
    staying, refilled = [], []
    for row, writing in enumerate(group.writings):
        if writing.ending:
            continue
        if writing.begins and writing.request.policy != "route_once":
            route, before = next_route(writing), writing.route
            writing.reroute(route)
            if writing.request.policy == "refill" and route.mix != before.mix:
                refilled.append(writing)
                continue
        staying.append(row)
    if staying:
        writings = [group.writings[row] for row in staying]
        group.batch.keep(staying)
        group.batch.reroute([writing.route for writing in writings])
        group.batch.step([writing.ids[-1] for writing in writings])
        yield Group(group.batch, writings)
    if refilled:
        yield read_again(refilled)


def _add(groups: list[Group], group: Group) -> None:
    """Join a group to the first one if their caches allow it."""
    if groups and groups[0].batch.can_join and group.batch.can_join:
        groups[0].batch.join(group.batch)
        groups[0].writings += group.writings
    else:
        groups.append(group)
