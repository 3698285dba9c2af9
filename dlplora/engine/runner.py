"""Prompts → routes → answers: any mix of adapters for every prompt of a batch.

It knows nothing of tasks, metrics and folders. Routes come from a router or with the request.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

from dlplora.adapters import LoraAdapter
from dlplora.engine.answers import Answer, Piece, raising
from dlplora.engine.decisions import DecisionLog
from dlplora.engine.option_scoring import score_options
from dlplora.engine.parts import Splitter
from dlplora.engine.prefix_cache import PrefixCache
from dlplora.engine.prompts import prompt_tokens
from dlplora.engine.reading import prefill_rows, re_prefill
from dlplora.engine.requests import Request, check_text
from dlplora.engine.routing import RequestRouter
from dlplora.engine.running import RunningBatch
from dlplora.engine.scheduler import Scheduler
from dlplora.engine.sequence import Sequence as AnswerSequence
from dlplora.errors import GenerationError
from dlplora.lora.attach import Pool, attached
from dlplora.models import Base
from dlplora.records.routes import Route
from dlplora.records.scores import OptionScores
from dlplora.routing.base import Probe, Router
from dlplora.sampling import Sampling
from dlplora.words import Policy, is_number, is_whole

_COUNT = "a whole number, at least 1"


class Runner:
    """A base model with a pool of adapters, each prompt of a batch with its own mix.

    Several threads may use one; `pool` takes in and lets go of adapters meanwhile.

    Args:
        base: The frozen base model.
        pool: The adapters attached to it.
        router: Chooses the routes of requests that name none, by their texts or, as a probe, by
            the base model's own reading of them; where the base model answers, it continues from
            that.
        policy: When requests that name none are routed.
        name: What requests call this system.
        systems: Others that requests may name, over the same base model and its fused layers; all
            settings below but `fallback_below` and `log` hold for them, too.
        max_batch_size: How many answers are written at once.
        prefill_tokens: How many tokens of prompts are read before the answers that are being
            written get their next token.
        cache_mib: How much is kept of the keys and values of earlier prompts and answers, for
            prompts that begin alike.
        fallback_below: Routes of less confidence go to the base model instead.
        window_chars: How many of the last characters the router reads of a chat, or when a sentence
            begins.
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
        name: str = "default",
        systems: Mapping[str, RequestRouter] | None = None,
        max_batch_size: int = 16,
        prefill_tokens: int = 512,
        cache_mib: float = 256,
        fallback_below: float = 0.0,
        window_chars: int = 2000,
        language: str = "en",
        log: DecisionLog | None = None,
    ) -> None:
        for title, value, is_good, expected in (
            ("max_batch_size", max_batch_size, is_whole(max_batch_size, 1), _COUNT),
            ("prefill_tokens", prefill_tokens, is_whole(prefill_tokens, 1), _COUNT),
            ("window_chars", window_chars, is_whole(window_chars, 1), _COUNT),
            ("cache_mib", cache_mib, is_number(cache_mib) and cache_mib >= 0, "0 or more"),
            (
                "fallback_below",
                fallback_below,
                is_number(fallback_below) and 0 <= fallback_below <= 1,
                "0 to 1",
            ),
        ):
            if not is_good:
                raise GenerationError(f"{title} is {value!r}, expected {expected}")
        self.base = base
        self.pool = pool
        self._name = name
        own = RequestRouter(base, pool, router, policy, fallback_below, log=log)
        self._routers = {
            key: replace(one, window_chars=window_chars)
            for key, one in {**(systems or {}), name: own}.items()
        }
        self._max_batch_size = max_batch_size
        self._prefill_tokens = prefill_tokens
        self._cache = PrefixCache(cache_mib)
        self._language = language

    @classmethod
    @contextmanager
    def over(
        cls, base: Base, adapters: Sequence[LoraAdapter], **settings: Any
    ) -> Iterator["Runner"]:
        """Run prompts for the time of a `with` block; `settings` as for a runner."""
        with attached(base.model, adapters) as pool:
            yield cls(base, pool, **settings)

    @property
    def systems(self) -> dict[str, Policy]:
        """The systems that requests may name, each with its policy; the first is the default."""
        return {self._name: self._router.policy} | {
            name: router.policy for name, router in self._routers.items()
        }

    @property
    def _router(self) -> RequestRouter:
        return self._routers[self._name]

    def scheduler(self) -> Scheduler:
        """Return a scheduler, to which requests may be added at any time."""
        return self._new_scheduler(prefill_tokens=self._prefill_tokens, cache=self._cache)

    def _new_scheduler(self, *, prefill_tokens: int | None, cache: PrefixCache | None) -> Scheduler:
        return Scheduler(
            self.base,
            self.pool.layers,
            self._routers,
            default=self._name,
            max_batch_size=self._max_batch_size,
            prefill_tokens=prefill_tokens,
            cache=cache,
            language=self._language,
        )

    def split(self, request: Request) -> list[Request]:
        """Return the requests that ask the questions of a prompt; itself unless it is split.

        Raises `GenerationError` if the prompt cannot be split as it asks, or if its questions wait
        for one another's answers.
        """
        asked = Splitter().split(0, request, self._router)
        if asked[0][0] < 0 and request.visible == "own_and_answers":
            raise GenerationError("the questions wait for one another's answers; generate them")
        return [one for _, one in asked]

    def begin(
        self, requests: Sequence[Request], prompts: Sequence[tuple[int, ...]]
    ) -> RunningBatch:
        """Read the prompts of requests: by the first of their own routes, or the router's.

        Either all bring their routes or none does. What a probe has read for the base model is not
        read again where the base model answers.
        """
        router = self._router
        asked = [router.readings(request) for request in requests]
        batch = None
        if any(request.routes for request in requests):
            routes = [request.routes[0] for request in requests]
        elif router.probe is None:
            routes = router.routes(asked)
        else:
            batch, routes = router.read([readings[0] for readings in asked], prompts)
        rows = [router.row(route) for route in routes]
        if batch is None:
            batch = prefill_rows(self.base, self.pool.layers, prompts, rows)
        else:
            batch = re_prefill(batch, prompts, rows)
        sequences = [
            AnswerSequence(
                router, request, prompt, route, number=number, language=self._language, row=row
            )
            for number, (request, prompt, route, row) in enumerate(
                zip(requests, prompts, routes, batch.rows, strict=True)
            )
        ]
        return RunningBatch(batch, sequences)

    def finish(self, running: RunningBatch) -> list[Answer]:
        """Write the answers to prompts that were read; the batch is used up.

        Nobody else waits, so that whatever is read again is read at once.
        """
        scheduler = self._new_scheduler(prefill_tokens=None, cache=None)
        count = len(running.sequences)
        scheduler.resume(running)
        return _answers(_pieces(scheduler, iter(())), [1] * count)

    def generate(
        self, prompts: Sequence[str | Request], *, sampling: Sampling | None = None
    ) -> list[Answer]:
        """Answer prompts; `sampling` holds for those that are no requests of their own.

        A request of several answers has all of them in the list, one after another.
        """
        _check_list(prompts, "prompts")
        requests = [_request(prompt, sampling) for prompt in prompts]
        return _answers(self.run(requests), [request.n for request in requests])

    def stream(self, prompt: str | Request, *, sampling: Sampling | None = None) -> Iterator[Piece]:
        """Answer one prompt piece by piece; closing the iterator ends the answer."""
        return raising(self.run([_request(prompt, sampling)]))

    def run(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """Answer requests as places get free, and yield what is written, in turns.

        Requests are taken from the iterable when there are places for them, and numbered in their
        order. One that cannot be answered ends with a piece that holds its error; the others go
        on. Where requests arrive over time, use a `scheduler`.
        """
        return _pieces(self.scheduler(), iter(requests))

    def score(
        self, prompt: str, options: Sequence[str], *, route: Route | None = None
    ) -> OptionScores:
        """Return the log-likelihood of each option as the answer to a prompt."""
        _check_list(options, "options")
        for option in options:
            check_text(option, "an option")
        if not options or not all(self.base.chat.answer(option) for option in options):
            raise GenerationError(f"the options are {list(options)!r}, expected texts, none empty")
        longest = max(len(self.base.chat.answer(option)) for option in options)
        ids = prompt_tokens(self.base, Request(prompt, Sampling(max_new_tokens=longest)))
        routes = () if route is None else (route,)
        request = Request(prompt, routes=routes, policy="route_once")
        return score_options(self.begin([request], [ids]).batch, [options])[0]

    def route(self, texts: Sequence[str]) -> list[Route]:
        """Return the router's route for each text; unsure ones go to the base model."""
        _check_list(texts, "texts")
        for text in texts:
            check_text(text)
        if self._router.probe is None or not texts:
            return self._router.routes([(text,) for text in texts])
        one = Sampling(max_new_tokens=1)
        prompts = [prompt_tokens(self.base, Request(text, one)) for text in texts]
        return self._router.read(texts, prompts)[1]

    def reads(self, request: Request) -> bool:
        """Tell whether the model can read a request's prompt together with its answer."""
        try:
            prompt_tokens(self.base, request)
        except GenerationError:
            return False
        return True


def _pieces(scheduler: Scheduler, requests: Iterator[Request]) -> Iterator[Piece]:
    """Run a scheduler until all requests are answered; they are taken as places get free."""
    is_more = True
    while is_more or not scheduler.is_idle:
        if is_more and scheduler.has_room and not scheduler.num_waiting:
            taken = list(islice(requests, scheduler.num_free))
            is_more = len(taken) > 0
            for request in taken:
                scheduler.add(request)
        yield from scheduler.step()


def _request(prompt: str | Request, sampling: Sampling | None) -> Request:
    if isinstance(prompt, Request):
        return prompt
    return Request(prompt) if sampling is None else Request(prompt, sampling)


def _check_list(values: object, name: str) -> None:
    """Refuse one text where a list of them is expected: its letters would be taken for texts."""
    if isinstance(values, str):
        raise GenerationError(f"{name} is one text, expected a list of them")


def _answers(pieces: Iterator[Piece], counts: Sequence[int]) -> list[Answer]:
    """Return the answers of numbered requests, of which each has so many."""
    found = {
        (piece.number, piece.choice): piece.answer
        for piece in raising(pieces)
        if piece.answer is not None
    }
    return [found[number, choice] for number, count in enumerate(counts) for choice in range(count)]
