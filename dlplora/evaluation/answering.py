"""Batches of prompts answered by one system, or found in the store of answers."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from dlplora.engine.answers import Request
from dlplora.engine.runner import Runner
from dlplora.evaluation.answer_store import Answered, AnswerStore
from dlplora.evaluation.items import Prompt
from dlplora.lora.layout import PairsByPath, pairs_sha256
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
        self._hashes: dict[int, tuple[PairsByPath, str]] = {}

    def answer(self, prompts: Sequence[Prompt]) -> list[Answered]:
        """Return the answer to each prompt of a batch, and the scores of its options."""
        requests = self._routed([prompt.request for prompt in prompts])
        is_known = all(_is_known(request) for request in requests)
        asked = [
            (
                request.prompt,
                self._runner.base.chat.prompt(request.prompt),
                asdict(request.sampling),
                request.policy,
                request.num_answers,
                prompt.options,
            )
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        by = self._adapters(requests) if is_known else self._system.sha256()
        answered = self._store.batch([asked, by], lambda: self._ask(requests, prompts))
        if not is_known:
            return answered
        return [  # by equal adapters, but another router may be more or less sure of them
            replace(one, routes=_routes_of(request, len(one.texts)))
            for one, request in zip(answered, requests, strict=True)
        ]

    def _routed(self, requests: Sequence[Request]) -> list[Request]:
        """Give requests the routes and policies that can be told before the model reads them."""
        policies = [request.policy or self._system.policy for request in requests]
        can_route = not isinstance(self._system.router, Probe)
        is_routed = [
            can_route and not request.routes and policy == "route_once"
            for request, policy in zip(requests, policies, strict=True)
        ]
        texts = [r.prompt for r, routed in zip(requests, is_routed, strict=True) if routed]
        found = iter(self._runner.route(texts) if texts else [])
        told = [
            replace(request, routes=(next(found),)) if routed else request
            for request, routed in zip(requests, is_routed, strict=True)
        ]
        return [  # one route is the same under every policy
            replace(request, policy="route_once" if len(request.routes) == 1 else policy)
            for request, policy in zip(told, policies, strict=True)
        ]

    def _ask(self, requests: Sequence[Request], prompts: Sequence[Prompt]) -> list[Answered]:
        ids = [self._runner.base.chat.prompt(request.prompt) for request in requests]
        batch = self._runner.begin(requests, ids)
        firsts = batch.routes
        scored = iter(batch.score_options([p.options for p in prompts if p.options]))
        answers = self._runner.finish(batch, ids, requests)
        return [
            Answered(
                tuple(part.text for part in answer.parts),
                (first,) if prompt.is_single else tuple(part.route for part in answer.parts),
                next(scored) if prompt.options else None,
            )
            for prompt, answer, first in zip(prompts, answers, firsts, strict=True)
        ]

    def _adapters(self, requests: Sequence[Request]) -> list[Any]:
        """Describe the adapters of routes by their content; equal ones may still be two."""
        numbers: dict[int, int] = {}
        return [
            [
                [
                    (numbers.setdefault(id(pairs), len(numbers)), self._sha256(pairs), weight)
                    for pairs, weight in self._runner.pool.row(route)
                ]
                for route in request.routes
            ]
            for request in requests
        ]

    def _sha256(self, pairs: PairsByPath) -> str:
        if id(pairs) not in self._hashes:
            self._hashes[id(pairs)] = pairs, pairs_sha256(pairs)  # kept: its id stays its own
        return self._hashes[id(pairs)][1]


def _is_known(request: Request) -> bool:
    """Tell whether a request's routes say all about the adapters that answer it."""
    return bool(request.routes) and not any(route.per_token for route in request.routes)


def _routes_of(request: Request, num_answers: int) -> tuple[Route, ...]:
    last = len(request.routes) - 1
    return tuple(request.routes[min(place, last)] for place in range(num_answers))
