"""Prompts → routes → answers: any mix of adapters for every prompt of a batch.

It knows nothing of tasks, metrics and folders. Routes come from a router or with the request.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dlplora.adapters import LoraAdapter
from dlplora.engine.answers import (
    Answer,
    Piece,
    Request,
    cancelled_before,
    check_text,
    raising,
)
from dlplora.engine.batch import Batch
from dlplora.engine.decisions import DecisionLog
from dlplora.engine.loop import Group, run
from dlplora.engine.writing import Writing
from dlplora.errors import DlpLoraError, GenerationError, RouterError
from dlplora.lora.attach import Pool, attached
from dlplora.lora.mix import Row
from dlplora.models import Base
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.records.scores import OptionScores
from dlplora.routing.base import Probe, Router
from dlplora.sampling import Sampling
from dlplora.words import Policy


class Runner:
    """A base model with a pool of adapters, each prompt of a batch with its own mix.

    Several threads may use one; `pool` takes in and lets go of adapters meanwhile.

    Args:
        base: The frozen base model.
        pool: The adapters attached to it.
        router: Chooses the routes of requests that bring none, by their texts or, as a probe, by
            the base model's own reading of them; where the base model answers, it goes on from
            that reading.
        policy: When requests that name none are routed again.
        places: How many sequences are written at once.
        fallback_below: Routes of less confidence go to the base model instead.
        window_chars: How many of the last characters the router reads when a sentence begins.
        language: The language of the answers, by which sentences are told apart.
        log: Writes down every decision.
    """

    def __init__(
        self,
        base: Base,
        pool: Pool,
        *,
        router: Router | Probe | None = None,
        policy: Policy = "route_once",
        places: int = 16,
        fallback_below: float = 0.0,
        window_chars: int = 2000,
        language: str = "en",
        log: DecisionLog | None = None,
    ) -> None:
        for name, value in {"places": places, "window_chars": window_chars}.items():
            if value < 1:
                raise GenerationError(f"{name} is {value}, expected at least 1")
        if not 0 <= fallback_below <= 1:
            raise GenerationError(f"fallback_below is {fallback_below}, expected 0 to 1")
        self.base = base
        self.pool = pool
        self._router = router
        self._policy = policy
        self._places = places
        self._fallback_below = fallback_below
        self._window_chars = window_chars
        self._language = language
        self._log = log

    @classmethod
    @contextmanager
    def over(
        cls, base: Base, adapters: Sequence[LoraAdapter], **settings: Any
    ) -> Iterator["Runner"]:
        """Run prompts for the time of a `with` block; `settings` as for a runner."""
        with attached(base.model, adapters) as pool:
            yield cls(base, pool, **settings)

    def read(self, prompts: Sequence[Sequence[int]], routes: Sequence[Route]) -> Batch:
        """Read prompts, each by its route, once for all that follows."""
        return Batch.read(self.base, self.pool, prompts, routes)

    def read_by(
        self, router: Router | Probe, texts: Sequence[str], prompts: Sequence[Sequence[int]]
    ) -> Batch:
        """Read prompts, each by the route that a router gives the text that it was made of.

        What a probe has read for the base model is not read again where the base model answers.
        """
        if not isinstance(router, Probe):
            return self.read(prompts, self._routed(router, texts))
        batch, routes = self._probe(router, texts, prompts)
        return batch.read_anew(prompts, routes)

    def begin(self, requests: Sequence[Request], prompts: Sequence[Sequence[int]]) -> Batch:
        """Read the prompts of requests: by the first of their own routes, or the router's."""
        told = [request.routes[0] for request in requests if request.routes]
        if len(told) == len(requests):
            return self.read(prompts, told)
        return self.read_by(self._chooser(), [request.prompt for request in requests], prompts)

    def finish(
        self, batch: Batch, prompts: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> list[Answer]:
        """Write the answers to prompts that were read; the batch stays as it is."""
        writings = [
            self._writing(request, number, prompt, route, row)
            for number, (request, prompt, route, row) in enumerate(
                zip(requests, prompts, batch.routes, batch.rows, strict=True)
            )
        ]
        return _answers(self._run([Group(batch.twin(), writings)], iter(())), len(writings))

    def generate(
        self, prompts: Sequence[str | Request], *, sampling: Sampling | None = None
    ) -> list[Answer]:
        """Answer prompts; `sampling` holds for those that are no requests of their own."""
        _check_list(prompts, "prompts")
        requests = [_request(prompt, sampling) for prompt in prompts]
        return _answers(self.run(requests), len(requests))

    def stream(self, prompt: str | Request, *, sampling: Sampling | None = None) -> Iterator[Piece]:
        """Answer one prompt piece by piece; closing the iterator frees its place."""
        return raising(self.run([_request(prompt, sampling)]))

    def run(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """Answer requests as places get free, and yield what is written, in turns.

        Requests are taken from the iterable when there are places for them, as many as there are
        places, and numbered in their order; an iterable that waits for the next one holds up all
        answers. One that cannot be answered ends with a piece that holds its error; the
        others go on.
        """
        return self._run([], enumerate(requests))

    def score(
        self, prompt: str, options: Sequence[str], *, route: Route | None = None
    ) -> OptionScores:
        """Return the log-likelihood of each option as the answer to a prompt."""
        _check_list(options, "options")
        if not options or not all(self.base.chat.answer(option) for option in options):
            raise GenerationError(f"the options are {list(options)!r}, expected texts, none empty")
        longest = max(len(self.base.chat.answer(option)) for option in options)
        read = self._prompt(prompt, new_tokens=longest)
        if route is None:
            batch = self.read_by(self._chooser(), [prompt], [read])
        else:
            batch = self.read([read], [route])
        return batch.score_options([options])[0]

    def route(self, texts: Sequence[str]) -> list[Route]:
        """Return the router's route for each text; unsure ones go to the base model."""
        _check_list(texts, "texts")
        for text in texts:
            check_text(text)
        router = self._chooser()
        if not texts:
            return []
        if isinstance(router, Probe):
            prompts = [self._prompt(text, new_tokens=1) for text in texts]
            return self._probe(router, texts, prompts)[1]
        return self._routed(router, texts)

    def reads(self, request: Request) -> bool:
        """Tell whether the model can read a request's prompt together with its answer."""
        room = self.base.room(self.base.chat.prompt(request.prompt))
        return request.sampling.max_new_tokens <= room

    def inputs(self, texts: Sequence[str], path: str) -> Tensor:
        """Return what the layer at a path reads of each prompt's last token (B, I), base alone."""
        prompts = [self._prompt(text, new_tokens=1) for text in texts]
        return Batch.probe(self.base, self.pool, prompts, path)[1]

    def _chooser(self) -> Router | Probe:
        if self._router is None:
            raise RouterError("the engine has no router, or is closed; requests need routes")
        return self._router

    def _routed(self, router: Router, texts: Sequence[str]) -> list[Route]:
        start = time.perf_counter()
        return self._judged(texts, router.route(texts), start)

    def _judged(self, texts: Sequence[str], chosen: Sequence[Route], start: float) -> list[Route]:
        """Send what a router is unsure of to the base model, and log all that it chose.

        `start` is when it began to choose, by the performance counter.
        """
        milliseconds = 1000 * (time.perf_counter() - start) / len(texts)
        routes = []
        for text, found in zip(texts, chosen, strict=True):
            unsure = found.confidence is not None and found.confidence < self._fallback_below
            route = Route((), (), found.confidence) if unsure else found
            if self._log is not None:
                self._log.write(
                    text,
                    route,
                    fallback=unsure,
                    num_tokens=len(self.base.chat.prompt(text)),
                    milliseconds=milliseconds,
                )
            routes.append(route)
        return routes

    def _run(self, groups: list[Group], numbered: Iterator[tuple[int, Request]]) -> Iterator[Piece]:
        return run(
            groups,
            numbered,
            places=self._places,
            begin=self._begin,
            read_again=self._read_again,
            next_route=self._next_route,
        )

    def _begin(self, numbered: Sequence[tuple[int, Request]]) -> tuple[list[Group], list[Piece]]:
        """Route and read the prompts of requests; return those refused apart."""
        refused = [cancelled_before(number) for number, r in numbered if r.cancelled.is_set()]
        numbered = [(number, r) for number, r in numbered if not r.cancelled.is_set()]
        writings = []
        for (number, request), route in zip(numbered, self._first_routes(numbered), strict=True):
            try:
                if isinstance(route, DlpLoraError):
                    raise route
                row = self.pool.row(route)
                prompt = self._prompt(request.prompt, new_tokens=request.sampling.max_new_tokens)
                writings.append(self._writing(request, number, prompt, route, row))
            except DlpLoraError as error:
                refused.append(Piece(number, "", BASE_ROUTE, error=error))
        probed = [writing for writing in writings if self._is_probed(writing.request)]
        routed = [writing for writing in writings if not self._is_probed(writing.request)]
        groups = [self._read_again(routed)] if routed else []
        if isinstance(self._router, Probe) and probed:
            groups += self._read_probed(self._router, probed)
            refused += [
                Piece(writing.number, "", BASE_ROUTE, error=writing.error)
                for writing in probed
                if writing.error is not None
            ]
        return groups, refused

    def _is_probed(self, request: Request) -> bool:
        return isinstance(self._router, Probe) and not request.routes

    def _first_routes(
        self, numbered: Sequence[tuple[int, Request]]
    ) -> Iterator[Route | DlpLoraError]:
        """Yield the route that each request begins with, or why the router gave none.

        What is to be probed is the base model's at first, which reads it.
        """
        unrouted = [
            request.prompt
            for _, request in numbered
            if not request.routes and not self._is_probed(request)
        ]
        found: Iterator[Route | DlpLoraError]
        try:
            found = iter(self.route(unrouted) if unrouted else [])
        except DlpLoraError as error:
            found = iter([error] * len(unrouted))
        for _, request in numbered:
            if request.routes:
                yield request.routes[0]
            else:
                yield BASE_ROUTE if self._is_probed(request) else next(found)

    def _read_probed(self, router: Probe, writings: Sequence[Writing]) -> list[Group]:
        """Read prompts by the base model, and those that it is not to answer by their routes.

        A writing whose route cannot be taken gets the error.
        """
        ids = [writing.ids for writing in writings]
        texts = [writing.request.prompt for writing in writings]
        try:
            batch, routes = self._probe(router, texts, ids)
        except DlpLoraError as error:
            for writing in writings:
                writing.error = error
            return []
        for writing, route in zip(writings, routes, strict=True):
            try:
                writing.reroute(route, self.pool.row(route))
            except DlpLoraError as error:
                writing.error = error
        going_on = [place for place, writing in enumerate(writings) if writing.is_open]
        if not going_on:
            return []
        writings = [writings[place] for place in going_on]
        batch.keep(going_on)
        batch = batch.read_anew(
            [writing.ids for writing in writings],
            [writing.route for writing in writings],
            [writing.row for writing in writings],
        )
        return [Group(batch, list(writings))]

    def _probe(
        self, router: Probe, texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> tuple[Batch, list[Route]]:
        """Read tokens by the base model, and ask a router what it makes of that."""
        start = time.perf_counter()
        batch, inputs_BI = Batch.probe(self.base, self.pool, ids, router.path)
        return batch, self._judged(texts, router.routes(inputs_BI), start)

    def _prompt(self, text: str, *, new_tokens: int) -> tuple[int, ...]:
        """Render a prompt; `GenerationError` if the model cannot read it and the answer."""
        prompt = self.base.chat.prompt(text)
        if not prompt:
            raise GenerationError("the prompt is empty, expected a text")
        if new_tokens > self.base.room(prompt):
            raise GenerationError(
                f"the prompt has {len(prompt):,} tokens and {new_tokens:,} may be generated; the "
                f"model reads {self.base.context:,} in all"
            )
        return prompt

    def _read_again(self, writings: Sequence[Writing]) -> Group:
        """Read all that was asked and written so far, by the routes of now."""
        ids = [writing.ids for writing in writings]
        routes = [writing.route for writing in writings]
        rows = [writing.row for writing in writings]
        return Group(Batch.read(self.base, self.pool, ids, routes, rows=rows), list(writings))

    def _next_route(self, writing: Writing) -> tuple[Route, Row]:
        """Return the route of a sentence that has begun, and its adapters."""
        request = writing.request
        text = f"{request.prompt}\n{writing.text}"[-self._window_chars :]
        if request.routes:
            route = request.routes[min(writing.num_ended, len(request.routes) - 1)]
        elif isinstance(self._router, Probe):
            route = self._probe(self._router, [text], [writing.ids])[1][0]
        else:
            route = self.route([text])[0]
        stays = route.mix == writing.route.mix  # so do its adapters, also removed ones
        return route, writing.row if stays else self.pool.row(route)

    def _writing(
        self, request: Request, number: int, prompt: Sequence[int], route: Route, row: Row
    ) -> Writing:
        policy = request.policy or self._policy
        if len(request.routes) > 1 and policy == "route_once":
            raise GenerationError(
                f"{len(request.routes)} routes with the policy route_once, which takes one"
            )
        return Writing(
            request,
            number,
            prompt,
            route,
            row,
            self.base.chat,
            policy=policy,
            end_ids=self.base.end_ids,
            device=self.base.device,
            language=self._language,
        )


def _request(prompt: str | Request, sampling: Sampling | None) -> Request:
    if isinstance(prompt, Request):
        return prompt
    return Request(prompt) if sampling is None else Request(prompt, sampling)


def _check_list(values: object, name: str) -> None:
    """Refuse one text where a list of them is expected: its letters would be taken for texts."""
    if isinstance(values, str):
        raise GenerationError(f"{name} is one text, expected a list of them")


def _answers(pieces: Iterator[Piece], count: int) -> list[Answer]:
    found = {piece.number: piece.answer for piece in raising(pieces) if piece.answer is not None}
    return [found[number] for number in range(count)]
