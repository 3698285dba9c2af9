"""How the requests of one system get their routes: by its router, or by a probe of the base model.

Shapes: B prompts, I inputs of a layer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from dlplora.engine.batch import Batch
from dlplora.engine.decisions import DecisionLog
from dlplora.engine.prefill import Prefill
from dlplora.engine.reading import probe
from dlplora.engine.requests import Request, check_text
from dlplora.engine.segments import Segment, numbered, segments_of
from dlplora.engine.sequence import Sequence as AnswerSequence
from dlplora.engine.sequence import as_request_error
from dlplora.errors import DlpLoraError, GenerationError, RouterError
from dlplora.lora.attach import Pool
from dlplora.lora.mix import Row
from dlplora.models import Base
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.routing.base import Probe, Router
from dlplora.words import Policy


@dataclass(frozen=True)
class RequestRouter:
    """The routes of one system's requests.

    Args:
        base: The base model.
        pool: The adapters that routes may name.
        router: Chooses the routes of requests that name none, by their texts or, as a probe, by
            the base model's own reading of them.
        policy: When requests that name none are routed.
        fallback_below: Routes of less confidence go to the base model instead.
        window_chars: How many of the last characters the router reads of a chat, or when a sentence
            begins.
        log: Writes down every decision.
    """

    base: Base
    pool: Pool
    router: Router | Probe | None = None
    policy: Policy = "route_once"
    fallback_below: float = 0.0
    window_chars: int = 2000
    log: DecisionLog | None = None

    @property
    def probe(self) -> Probe | None:
        """The router, if it is a probe."""
        return self.router if isinstance(self.router, Probe) else None

    def policy_of(self, request: Request) -> Policy:
        """Return when a request is routed: as it says, or as the system does."""
        return request.policy or self.policy

    def row(self, route: Route) -> Row:
        """Take the adapters of a route as they are now; `RouterError` on one that is not here."""
        return self.pool.row(route)

    def readings(self, request: Request, sequence: AnswerSequence | None = None) -> tuple[str, ...]:
        """Return what the router reads of a request, and of its answer so far, in one or two ways.

        The route of the reading that it is surest of counts. Of a numbered prompt whose answers
        are routed one by one, only the question that is being answered is read.
        """
        prompt = request.prompt
        if isinstance(prompt, str):
            turns = [prompt]
        elif isinstance(prompt[0], int):
            ids = [token for token in prompt if isinstance(token, int)]
            turns = [self.base.chat.decode(ids)]
        else:
            turns = [turn.content for turn in prompt if not isinstance(turn, int)]
        texts = {"last_turn": turns[-1], "window": "\n".join(turns)[-self.window_chars :]}
        written = sequence.text if sequence else ""
        found: tuple[str, ...] = (turns[0],)
        if pending := self._pending(request, turns[-1], sequence.num_ended if sequence else 0):
            found = (pending,)
            written = sequence.open_answer if sequence else ""
        elif request.route_on != "surest":
            found = (texts[request.route_on],)
        elif len(turns) > 1:
            found = tuple(texts.values())
        if not written:
            return found
        return tuple(f"{text}\n{written}"[-self.window_chars :] for text in found)

    def _pending(self, request: Request, text: str, num_ended: int) -> str | None:
        """Return the question that is answered next, if a prompt numbers those that it asks for."""
        if request.num_answers == 1 or self.policy_of(request) == "route_once":
            return None
        listed = numbered(text)
        if listed is None or len(listed[1]) != request.num_answers:
            return None
        return listed[1][num_ended].text

    def routes(self, asked: Sequence[Sequence[str]]) -> list[Route]:
        """Return the router's route for each text, of which there may be several readings.

        Raises `RouterError` if there is no router that reads texts.
        """
        start = time.perf_counter()
        texts = [text for readings in asked for text in readings]
        found = zip(texts, self._found(texts), strict=True)
        surest = [
            max(islice(found, len(readings)), key=lambda pair: pair[1].confidence or 0.0)
            for readings in asked
        ]
        return self._judged([text for text, _ in surest], [route for _, route in surest], start)

    def split(self, request: Request) -> tuple[tuple[Segment, ...], list[Route]]:
        """Return the questions of a request, none if it is left whole, and the route of each.

        Several routes of the request are those of its questions, one after another. There are none
        where a probe is to choose. Of a text that is left whole there is one if the router was
        asked for it on the way. Raises `GenerationError` if there are fewer or more questions
        than routes or `num_answers` ask for, or too many.
        """
        text = request.last_turn
        if text is None or request.n > 1 or len(request.routes) == 1:
            return (), []
        known: dict[str, Route] = {}
        start = time.perf_counter()

        def look(texts: Sequence[str]) -> list[Route]:
            if request.routes or self.probe:
                return [BASE_ROUTE] * len(texts)
            new = [one for one in dict.fromkeys(texts) if one not in known]
            known.update(zip(new, self._found(new), strict=True))
            return [known[one] for one in texts]

        segments = segments_of(text, look)
        for asked, name in ((len(request.routes), "routes"), (request.num_answers, "num_answers")):
            if asked > 1 and asked != len(segments):
                raise GenerationError(
                    f"{name} asks for {asked} questions; the prompt holds {len(segments)}"
                )
        if len(segments) < 2:
            is_known = text == request.prompt and text in known
            return (), self._judged([text], [known[text]], start) if is_known else []
        if request.routes or self.probe:
            return segments, list(request.routes)
        texts = [segment.text for segment in segments]
        return segments, self._judged(texts, look(texts), start)

    def _found(self, texts: Sequence[str]) -> list[Route]:
        """Return the route that the router chooses for each text, whatever its confidence.

        Raises `RouterError` if there is no router that reads texts.
        """
        if self.router is None:
            raise RouterError("the engine has no router, or is closed; requests need routes")
        assert not isinstance(self.router, Probe)
        for text in texts:
            check_text(text)
        return self.router.route(texts) if texts else []

    def route_probed(
        self, sequences: Sequence[AnswerSequence], read: Prefill, seconds: float
    ) -> None:
        """Route prompts by what the probe's layer read of them, which took so many seconds.

        Those that are ended are passed over; one that cannot be routed gets the error.
        """
        places = [place for place, sequence in enumerate(sequences) if sequence.is_open]
        opened = [sequences[place] for place in places]
        texts = [self.readings(one.request, one)[0] for one in opened]
        try:
            routes = self._probed(texts, read.inputs()[places], seconds)
        except Exception as error:
            for sequence in opened:
                sequence.error = as_request_error(error)
            return
        for sequence, route in zip(opened, routes, strict=True):
            sequence.probe = None
            self._reroute(sequence, route)

    def _probed(self, texts: Sequence[str], inputs_BI: Tensor, seconds: float) -> list[Route]:
        """Return the probe's route for each prompt, as `routes` does."""
        assert self.probe is not None
        start = time.perf_counter() - seconds
        return self._judged(texts, self.probe.routes(inputs_BI), start)

    def route_next(self, sequence: AnswerSequence) -> None:
        """Route a sentence or answer that has begun, unless a probe is to do it.

        The sequence gets the error if it cannot be routed.
        """
        request = sequence.request
        try:
            if request.routes:
                last = len(request.routes) - 1
                route = request.routes[min(sequence.num_ended, last)]
            elif self.probe is not None:
                sequence.probe = self.probe
                return
            else:
                (route,) = self.routes([self.readings(request, sequence)])
        except Exception as error:
            sequence.error = as_request_error(error)
        else:
            self._reroute(sequence, route)

    def read(
        self, texts: Sequence[str], prompts: Sequence[Sequence[int]]
    ) -> tuple[Batch, list[Route]]:
        """Let the probe read prompts; return what the base model read, and their routes."""
        assert self.probe is not None
        start = time.perf_counter()
        batch, inputs_BI = probe(self.base, self.pool, prompts, self.probe.path)
        return batch, self._probed(texts, inputs_BI, time.perf_counter() - start)

    def _reroute(self, sequence: AnswerSequence, route: Route) -> None:
        try:
            stays = route.mix == sequence.route.mix  # so do its adapters, also removed ones
            sequence.reroute(route, sequence.row if stays else self.row(route))
        except DlpLoraError as error:
            sequence.error = error

    def _judged(self, texts: Sequence[str], chosen: Sequence[Route], start: float) -> list[Route]:
        """Send what a router is unsure of to the base model, and log all that it chose.

        `start` is when it began to choose, by the performance counter.
        """
        milliseconds = 1000 * (time.perf_counter() - start) / max(1, len(texts))
        routes = []
        for text, found in zip(texts, chosen, strict=True):
            is_unsure = found.confidence is not None and found.confidence < self.fallback_below
            route = Route((), (), found.confidence) if is_unsure else found.checked()
            if self.log is not None:
                self.log.write(
                    text,
                    route,
                    fallback=is_unsure,
                    num_tokens=len(self.base.chat.prompt(text)),
                    milliseconds=milliseconds,
                )
            routes.append(route)
        return routes


def first_routes(
    requests: Sequence[tuple[int, Request]], router_of: Callable[[Request], RequestRouter]
) -> dict[int, Route | DlpLoraError]:
    """Return the route that each numbered request begins with, or why it has none.

    What is to be probed is the base model's at first.
    """
    found: dict[int, Route | DlpLoraError] = {}
    asked: dict[int, tuple[RequestRouter, list[tuple[int, Request]]]] = {}
    for number, request in requests:
        try:
            router = router_of(request)
        except DlpLoraError as error:
            found[number] = error
            continue
        if request.routes:
            found[number] = request.routes[0]
        elif router.probe:
            found[number] = BASE_ROUTE
        else:
            asked.setdefault(id(router), (router, []))[1].append((number, request))
    for router, own in asked.values():
        found |= _routes(router, own)
    return found


def _routes(
    router: RequestRouter, requests: Sequence[tuple[int, Request]]
) -> dict[int, Route | DlpLoraError]:
    """Route requests together; each by itself if that fails, so that it fails alone."""
    numbers = [number for number, _ in requests]
    try:
        routes = router.routes([router.readings(request) for _, request in requests])
    except Exception as error:
        if len(requests) == 1:
            return {numbers[0]: as_request_error(error)}
        return {k: v for one in requests for k, v in _routes(router, [one]).items()}
    return dict(zip(numbers, routes, strict=True))
