"""Requests that wait, are read and are answered, one token a step for all of them."""

import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import count

from dlplora.engine.answers import Piece, cancelled_piece
from dlplora.engine.parts import Splitter
from dlplora.engine.prefill_queue import PrefillQueue, Read
from dlplora.engine.prefix_cache import PrefixCache
from dlplora.engine.prompts import prompt_tokens
from dlplora.engine.requests import Request
from dlplora.engine.routing import RequestRouter, first_routes
from dlplora.engine.running import RunningBatch, add_running
from dlplora.engine.sequence import Sequence, refusals
from dlplora.errors import DlpLoraError, GenerationError, choices
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import row_key
from dlplora.models import Base
from dlplora.records.routes import Route


class Scheduler:
    """Owns the requests that wait, are read and are answered.

    A request may be added at any time, from any thread; one thread calls `step`, over and over. A
    step reads one part of the queued prompts, and writes one token of every answer. A
    request that cannot be answered ends alone, with its error; one that is cancelled leaves with
    the next step.

    Args:
        base: The base model.
        layers: Its fused layers.
        routers: What routes the requests of each system, by the system's name.
        default: The system of requests that name none.
        max_batch_size: How many answers are written at once.
        prefill_tokens: How many tokens of prompts a step reads, padding included: so long all
            answers wait. None reads all prompts at once.
        cache: Keys and values of earlier prompts, shared by schedulers of one model.
        language: The language of the answers, by which sentences are told apart.
    """

    def __init__(
        self,
        base: Base,
        layers: FusedLayers,
        routers: Mapping[str, RequestRouter],
        *,
        default: str,
        max_batch_size: int,
        prefill_tokens: int | None,
        cache: PrefixCache | None,
        language: str,
    ) -> None:
        self._base = base
        self._routers = routers
        self._default = default
        self._max_batch_size = max_batch_size
        self._prefill_tokens = prefill_tokens
        self._cache = cache
        self._language = language
        self._splitter = Splitter()
        self._numbers = count()
        self._adding = threading.Lock()
        self._added: deque[tuple[int, Request]] = deque()  # by any thread …
        self._waiting: deque[tuple[int, Request]] = deque()  # … and split, by that of `step`
        self._reading = PrefillQueue(base, layers, cache)
        self._running: list[RunningBatch] = []

    def add(self, request: Request) -> int:
        """Queue a request; return its number, by which its pieces are told apart.

        Raises `GenerationError` if it is none.
        """
        if not isinstance(request, Request):
            raise GenerationError(f"a request is {type(request).__name__}, expected a Request")
        with self._adding:
            number = next(self._numbers)
            self._added.append((number, request))
        return number

    def resume(self, running: RunningBatch) -> None:
        """Take over sequences whose prompts were read by others."""
        self._running.append(running)

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing waits, is read or is answered."""
        return not (self._added or self._waiting or len(self._reading) or self._running)

    @property
    def num_waiting(self) -> int:
        """How many requests wait for a place."""
        return len(self._added) + len(self._waiting)

    @property
    def num_free(self) -> int:
        """How many more answers could be begun."""
        running = sum(len(running.sequences) for running in self._running)
        reading = sum(sequence.num_places for sequence in self._reading.sequences)
        return self._max_batch_size - running - reading

    @property
    def has_room(self) -> bool:
        """Tell whether several requests can enter together, which costs little more than one."""
        return 4 * self.num_free >= self._max_batch_size

    def step(self) -> list[Piece]:
        """Continue all requests; return what was written, and what ended."""
        pieces = self._end_cancelled()
        pieces += self._split()
        pieces += self._admit()
        for read in self._reading.advance(self._prefill_tokens):
            try:
                pieces += self._begin(read)
            except Exception as error:  # for want of memory
                pieces += _last_pieces(read.sequences, [], error)
        return self._join(pieces + self._write())

    def _split(self) -> list[Piece]:
        """Split the prompts that are next into their questions; return those that cannot be."""
        refused: list[Piece] = []
        while self._added and len(self._waiting) < self.num_free:
            number, request = self._added.popleft()
            try:
                self._waiting += self._splitter.split(number, request, self._router(request))
            except Exception as error:
                refused += refusals(number, request, error)
        return refused

    def _join(self, pieces: list[Piece]) -> list[Piece]:
        """Put the pieces of split prompts together; queue questions that waited for an answer."""
        joined, asked = self._splitter.join(pieces)
        self._waiting.extendleft(reversed(asked))
        return joined

    def _end_cancelled(self) -> list[Piece]:
        """End requests that were cancelled before anything of their answers was written."""
        gone: list[tuple[int, Request]] = []
        for queue in (self._added, self._waiting):
            with self._adding:
                cancelled = [one for one in queue if one[1].cancelled.is_set()]
                for one in cancelled:
                    queue.remove(one)
            gone += cancelled
        pieces = [
            cancelled_piece(number, choice) for number, one in gone for choice in range(one.n)
        ]
        for sequence in list(self._reading.sequences):
            if sequence.request.cancelled.is_set():
                pieces += [one.piece(one.cancel()) for one in sequence.split()]
        self._reading.drop_ended()
        return pieces

    def _admit(self) -> list[Piece]:
        """Let requests enter for which there is room; return those that are refused."""
        entering, prompts, refused = self._take(), dict[int, tuple[int, ...]](), list[Piece]()
        for number, request in entering:
            try:  # before anything is routed: what cannot be read costs nothing
                prompts[number] = self._prompt(request)
            except Exception as error:
                refused += refusals(number, request, error)
        readable = [one for one in entering if one[0] in prompts]
        routes, sequences = first_routes(readable, self._router), []
        for number, request in readable:
            try:
                if isinstance(route := routes[number], DlpLoraError):
                    raise route
                sequences.append(self._sequence(number, request, prompts[number], route))
            except Exception as error:
                refused += refusals(number, request, error)
        return refused + self._read(sequences)

    def _read(self, sequences: list[Sequence]) -> list[Piece]:
        """Let prompts be read, each by itself if that fails; return those that cannot be."""
        try:
            self._reading.add(sequences)
        except Exception as error:
            if len(sequences) == 1:
                return sequences[0].last_pieces(error)
            return [piece for sequence in sequences for piece in self._read([sequence])]
        return []

    def _take(self) -> list[tuple[int, Request]]:
        """Take from those who wait as many as there is room for."""
        entering: list[tuple[int, Request]] = []
        free = self.num_free
        while self._waiting:
            places = min(self._waiting[0][1].n, self._max_batch_size)
            if places > free:
                break
            entering.append(self._waiting.popleft())
            free -= places
        return entering

    def _prompt(self, request: Request) -> tuple[int, ...]:
        """Return the tokens of a prompt; `GenerationError` if it cannot be answered."""
        if request.n > self._max_batch_size:
            raise GenerationError(
                f"n is {request.n}, expected at most {self._max_batch_size}, the largest batch"
            )
        return prompt_tokens(self._base, request)

    def _sequence(
        self, number: int, request: Request, prompt: tuple[int, ...], route: Route
    ) -> Sequence:
        """Return the beginning of the answer to a request."""
        router = self._router(request)
        sequence = Sequence(router, request, prompt, route, number=number, language=self._language)
        sequence.probe = None if request.routes else router.probe
        return sequence

    def _router(self, request: Request) -> RequestRouter:
        """Return what routes a request; `GenerationError` says which systems there are."""
        name = self._default if request.system is None else request.system
        if name not in self._routers:
            raise GenerationError(f"no system {name!r}; there are: {choices(self._routers)}")
        router, least = self._routers[name], request.fallback_below
        return router if least is None else replace(router, fallback_below=least)

    def _begin(self, read: Read) -> list[Piece]:
        """Let prompts that were read be answered; those that a probe routes away, be read again.

        Returns those that cannot be.
        """
        opened = [sequence for sequence in read.sequences if sequence.is_open]
        if read.error is not None:
            return [piece for one in opened for piece in one.last_pieces(read.error)]
        running = RunningBatch(read.prefill.batch(), read.sequences)
        if opened[0].probe:
            opened[0].router.route_probed(read.sequences, read.prefill, read.seconds)
        again, staying = [], []
        for place, sequence in enumerate(read.sequences):
            if not sequence.is_open:
                continue
            if not sequence.needs_prefill:
                self._resume_parked(sequence)
            elif row_key(sequence.row) == row_key(running.batch.rows[place]):
                sequence.is_rerouted = False
                staying.append(place)
            else:
                sequence.prompt_scores = ()  # those of the base model
                again.append(sequence)
            sequence.parked = None
        if staying:
            running.keep(staying)
            running.split()
            add_running(self._running, running)
        failed = [one for one in opened if one.error is not None]
        return self._read(again) + [piece for one in failed for piece in one.last_pieces()]

    def _resume_parked(self, sequence: Sequence) -> None:
        """Continue an answer that a probe has routed, with what was read of it before."""
        assert sequence.parked is not None
        running = RunningBatch(sequence.parked, [sequence])
        running.step()
        add_running(self._running, running)

    def _write(self) -> list[Piece]:
        """Append a token to every answer, and predict the next ones."""
        pieces: list[Piece] = []
        for running in list(self._running):
            sequences, told = running.sequences, list[Piece]()
            try:
                self._write_batch(running, told)
            except Exception as error:  # of the model, or for want of memory
                self._running.remove(running)
                told += _last_pieces(sequences, told, error)
            pieces += told
        return pieces

    def _write_batch(self, running: RunningBatch, pieces: list[Piece]) -> None:
        """Do so in one batch; add what was written to the pieces."""
        texts = running.choose_tokens()
        leaving = self._reroute(running)
        pieces += [
            sequence.piece(text)
            for sequence, text in zip(running.sequences, texts, strict=True)
            if text or not sequence.is_open
        ]
        if self._cache is not None:
            running.store_ended(self._cache)
        staying = [
            row
            for row, sequence in enumerate(running.sequences)
            if sequence.is_open and sequence not in leaving
        ]
        pieces += self._read(leaving)
        if staying:
            running.keep(staying)
            running.step()
        else:
            self._running.remove(running)

    def _reroute(self, running: RunningBatch) -> list[Sequence]:
        """Route the sentences that have begun; return what has to be read before it continues."""
        leaving = []
        for row, sequence in enumerate(running.sequences):
            if not (sequence.is_open and sequence.begins and sequence.policy != "route_once"):
                continue
            sequence.router.route_next(sequence)
            if sequence.probe:
                sequence.parked = running.batch.fork()
                sequence.parked.keep([row])
                leaving.append(sequence)
            elif sequence.is_open and sequence.policy == "refill" and sequence.is_rerouted:
                leaving.append(sequence)
        return leaving


def _last_pieces(
    sequences: Iterable[Sequence], told: Iterable[Piece], error: Exception
) -> list[Piece]:
    """Return the last piece of every answer in a batch that failed, unless it was told before.

    One that has ended keeps its answer; the others end with the error.
    """
    ended = {(one.number, one.choice) for one in told if one.answer or one.error}
    return [
        piece
        for sequence in sequences
        for piece in (sequence.last_pieces(error) if sequence.is_open else [sequence.piece("")])
        if (piece.number, piece.choice) not in ended
    ]
