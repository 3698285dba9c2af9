"""Batches of prompts answered by one system, or found in the store of answers."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from typing import Any

from dlplora.engine.option_scoring import score_options
from dlplora.engine.prompts import prompt_tokens
from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.errors import GenerationError
from dlplora.evaluation.answer_store import Answered, AnsweredBatch, AnswerStore
from dlplora.evaluation.items import Prompt
from dlplora.lora.mix import weighted
from dlplora.records.routes import Route
from dlplora.routing.base import Probe
from dlplora.systems.system import System


class Answering:
    """Answers batches of prompts by a system that runs.

    Answers depend on the adapters of their routes; where those are not known before the model
    reads the prompts, on the whole system.
    """

    def __init__(self, runner: Runner, system: System, store: AnswerStore) -> None:
        self._runner = runner
        self._system = system
        self._store = store

    @cached_property
    def _whole_system(self) -> str:
        return self._system.sha256()

    def answer(self, prompts: Sequence[Prompt]) -> AnsweredBatch:
        """Return the answers to the prompts of a batch, with the scores of options.

        A prompt that is split is asked question by question. One whose options are weighed is left
        whole, and so is one that cannot be split.
        """
        split = [self._split(prompt) for prompt in prompts]
        requests = self._routed([request for own in split for request in own])
        options = [prompt.options for prompt, own in zip(prompts, split, strict=True) for _ in own]
        batch = self._answer(requests, options)
        answered = iter(batch.answered)
        joined = [_joined(list(islice(answered, len(own)))) for own in split]
        return replace(batch, answered=tuple(joined))

    def _split(self, prompt: Prompt) -> list[Request]:
        request = prompt.request
        if (request.policy or self._system.policy) != "split":
            return [request]
        if not prompt.options:
            with suppress(GenerationError):
                return self._runner.split(request)
        return [request.changed(policy="route_once", routes=request.routes[:1])]

    def _answer(
        self, requests: Sequence[Request], options: Sequence[tuple[str, ...]]
    ) -> AnsweredBatch:
        ids = [prompt_tokens(self._runner.base, request) for request in requests]
        is_known = all(_is_known(request) for request in requests)
        asked = [
            (
                request.prompt,
                tokens,
                asdict(request.sampling),
                request.policy,
                request.num_answers,
                own,
            )
            for request, tokens, own in zip(requests, ids, options, strict=True)
        ]
        by = self._adapters(requests) if is_known else self._whole_system
        batch = self._store.batch([asked, by], lambda: self._ask(requests, ids, options))
        if not is_known:
            return batch
        answered = [  # by equal adapters, but another router may be more or less sure of them
            replace(one, routes=_routes_of(request, len(one.texts)))
            for one, request in zip(batch.answered, requests, strict=True)
        ]
        return replace(batch, answered=tuple(answered))

    def _routed(self, requests: Sequence[Request]) -> list[Request]:
        """Give requests the routes and policies that can be told before the model reads them."""
        policies = [request.policy or self._system.policy for request in requests]
        can_route = not isinstance(self._system.router, Probe)
        is_routed = [
            can_route and not request.routes and policy == "route_once"
            for request, policy in zip(requests, policies, strict=True)
        ]
        texts = [str(r.prompt) for r, routed in zip(requests, is_routed, strict=True) if routed]
        found = iter(self._runner.route(texts) if texts else [])
        told = [
            replace(request, routes=(next(found),)) if routed else request
            for request, routed in zip(requests, is_routed, strict=True)
        ]
        return [  # one route is the same under every policy
            replace(request, policy="route_once" if len(request.routes) == 1 else policy)
            for request, policy in zip(told, policies, strict=True)
        ]

    def _ask(
        self,
        requests: Sequence[Request],
        ids: Sequence[tuple[int, ...]],
        options: Sequence[tuple[str, ...]],
    ) -> list[Answered]:
        running = self._runner.begin(requests, ids)
        firsts = [sequence.route for sequence in running.sequences]
        scored = score_options(running.batch, options)
        answers = self._runner.finish(running)
        return [
            Answered(
                tuple(part.text for part in answer.parts),
                (first,) if request.num_answers == 1 else tuple(p.route for p in answer.parts),
                scored[place] if own else None,
            )
            for place, (request, own, answer, first) in enumerate(
                zip(requests, options, answers, firsts, strict=True)
            )
        ]

    def _adapters(self, requests: Sequence[Request]) -> list[Any]:
        """Describe the adapters of routes by their content; equal ones may still be two."""
        numbers: dict[int, int] = {}
        return [
            [
                [
                    (numbers.setdefault(id(one), len(numbers)), one.sha256, weight)
                    for one, weight in weighted(self._runner.pool.row(route))
                ]
                for route in request.routes
            ]
            for request in requests
        ]


def _joined(parts: Sequence[Answered]) -> Answered:
    """Put the answers to the questions of one prompt together."""
    if len(parts) == 1:
        return parts[0]
    texts = tuple(text for part in parts for text in part.texts)
    return Answered(texts, tuple(route for part in parts for route in part.routes), None)


def _is_known(request: Request) -> bool:
    """Tell whether a request's routes say all about the adapters that answer it."""
    return bool(request.routes) and not any(route.per_token for route in request.routes)


def _routes_of(request: Request, num_answers: int) -> tuple[Route, ...]:
    last = len(request.routes) - 1
    return tuple(request.routes[min(place, last)] for place in range(num_answers))
