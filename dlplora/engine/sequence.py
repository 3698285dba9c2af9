"""One answer as it is written: its tokens, its text, its sentences and their routes."""

import copy
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from dlplora.engine.answers import Answer, Ending, Part, Passage, Piece
from dlplora.engine.detokenizer import Detokenizer
from dlplora.engine.logprobs import TokenScore
from dlplora.engine.requests import Request
from dlplora.engine.sentences import Sentences
from dlplora.errors import DlpLoraError, GenerationError, RequestFailedError, one_line
from dlplora.lora.mix import Row
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.routing.base import Probe
from dlplora.sampling import Sampler

if TYPE_CHECKING:
    from dlplora.engine.batch import Batch
    from dlplora.engine.routing import RequestRouter

_CONTEXT = 4  # tokens of a prompt that its continuation is decoded behind


class Sequence:
    """One answer to a request so far. `ids` are the tokens of prompt and answer.

    Args:
        router: What routes the request.
        request: What is asked.
        prompt: Its tokens.
        route: The route that the answer begins with.
        number: The request's number.
        language: The language of the answer, by which sentences are told apart.
        row: What the route stands for, where that is known; else the router's pool tells.

    Raises `GenerationError` if the request has several routes and its policy takes one.
    """

    def __init__(
        self,
        router: "RequestRouter",
        request: Request,
        prompt: tuple[int, ...],
        route: Route,
        *,
        number: int,
        language: str,
        row: Row | None = None,
    ) -> None:
        self.request = request
        self.policy = router.policy_of(request)
        assert self.policy != "split", "prompts are split before they are read"
        if len(request.routes) > 1 and self.policy == "route_once":
            raise GenerationError(
                f"{len(request.routes)} routes with the policy route_once, which takes one"
            )
        self.number = number
        self.route = route
        self.row = router.row(route) if row is None else row  # taken when the route was chosen
        self.is_rerouted = False  # the cache was computed under more than one row
        self.is_split = request.n == 1  # the other answers to the request have their sequences
        self.num_prompt = len(prompt)
        self.num_cached = 0
        self.prompt_scores: tuple[TokenScore, ...] = ()
        self.router = router
        self.probe: Probe | None = None  # what is to choose the route by reading all so far …
        self.parked: Batch | None = None  # … and what was read before the probe does
        self._prompt = prompt
        self._language = language
        self._begin(0)

    def _begin(self, choice: int) -> None:
        """Begin the answer of a number among those to the request."""
        told = self.request.sampling
        self.choice = choice
        self.ids = list(self._prompt)
        self.sampler = Sampler(
            replace(told, seed=(told.seed + choice) % 2**63),
            num_prompt=self.num_prompt,
            end_ids=self.router.base.end_ids,
            device=self.router.base.device,
        )
        self.ending: Ending | None = None
        self.error: DlpLoraError | None = None  # what ended it without an answer
        self.begins = False  # the router is to be asked: a sentence or an answer has begun …
        self._has_begun = False  # … and it was a sentence, with the last token
        self._starts = [0]  # where in the text the answers of a multi-question prompt begin …
        self._ended_by: list[Route] = []  # … and the routes that they ended by
        self._forced: deque[int] = deque()
        before = () if self.request.has_template else self._prompt[-_CONTEXT:]
        self._detokenizer = Detokenizer(self.router.base.chat, before)
        self._sentences = Sentences(self._language)
        self._routes: list[Route] = []
        self._written = ""
        self._shown = ""
        self._scores: list[TokenScore] = []
        self._num_shown_scores = 0

    def split(self) -> "list[Sequence]":
        """Return the sequences of all answers that the request asks for, this one first."""
        if self.is_split:
            return [self]
        self.is_split = True
        others = [copy.copy(self) for _ in range(1, self.request.n)]
        for choice, other in enumerate(others, start=1):
            other._begin(choice)
        return [self, *others]

    @property
    def needs_prefill(self) -> bool:
        """Tell whether what was asked and written has to be read by the row of now."""
        return self.parked is None or (self.policy == "refill" and self.is_rerouted)

    def last_pieces(self, error: Exception | None = None) -> list[Piece]:
        """End all answers to the request by an error, or return what each ended by."""
        sequences = self.split()
        for sequence in sequences:
            if error is not None and sequence.is_open:
                sequence.error = as_request_error(error)
            sequence.error = sequence.error or self.error
        return [sequence.piece("") for sequence in sequences]

    @property
    def num_places(self) -> int:
        """How many places in a batch it takes."""
        return 1 if self.is_split else self.request.n

    @property
    def is_open(self) -> bool:
        """Tell whether there is more to write."""
        return self.ending is None and self.error is None

    @property
    def wants_prompt_scores(self) -> bool:
        """Tell whether the prompt's tokens are still to be scored."""
        return self.request.echo and not self.prompt_scores

    @property
    def num_ended(self) -> int:
        """How many answers of a multi-question prompt were ended before the open one."""
        return len(self._starts) - 1

    @property
    def text(self) -> str:
        """The answer so far, its last word perhaps unfinished."""
        return self._trimmed(self._written)

    @property
    def open_answer(self) -> str:
        """What is written of the answer that is open, one of several to a prompt."""
        return self._written[self._starts[-1] :].strip()

    def accept(self, token: int) -> str:
        """Append a token that the model chose; return the text that is certain by it."""
        self.begins = False
        if self._forced:
            token = self._forced.popleft()
        elif token in self.router.base.end_ids and not self.request.sampling.ignore_eos:
            if len(self._starts) == self.request.num_answers:
                return self._finish("end")
            self._forced = deque(self.router.base.chat.answer("\n") or [token])
            token = self._forced.popleft()
            self._ended_by.append(self.route)
            self._starts.append(len(self._written))
            self.begins = True
        self.ids.append(token)
        self._write(self._detokenizer.add(token))
        if any(stop in self._written for stop in self._stops):
            return self._finish("stop")
        if len(self.ids) - self.num_prompt >= self.request.sampling.max_new_tokens:
            return self._finish("length")
        return self._show(self._certain())

    def add_score(self, score: TokenScore) -> None:
        """Keep the score of the token that was appended last."""
        self._scores.append(score)

    def piece(self, text: str) -> Piece:
        """Return what became certain, with all that is known once the answer is finished."""
        answer = self.answer() if self.ending else None
        scores = tuple(self._scores[self._num_shown_scores :])
        self._num_shown_scores = len(self._scores)
        return Piece(self.number, text, self.route, answer, self.error, self.choice, scores)

    def cancel(self) -> str:
        """End the answer here."""
        return self._finish("cancelled")

    def reroute(self, route: Route, row: Row) -> None:
        """Continue by another route; a sentence that has just begun is written by it."""
        if route.mix != self.route.mix:
            self.row = row
            self.is_rerouted = True
        self.route = route
        if self._has_begun:
            self._routes[-1] = route

    def answer(self) -> Answer:
        """Return the finished answer with its trace."""
        assert self.ending is not None
        return Answer(
            text=self._shown,
            parts=self._parts(),
            sentences=tuple(
                Passage(text, route)
                for text, route in zip(
                    self._sentences.all, self._routes[: len(self._sentences.all)], strict=True
                )
            ),
            ending=self.ending,
            num_tokens=len(self.ids) - self.num_prompt,
            num_prompt_tokens=self.num_prompt,
            num_cached_tokens=self.num_cached,
            tokens=tuple(self._scores),
            prompt_tokens=self.prompt_scores if self.request.echo else (),
        )

    def _parts(self) -> tuple[Part, ...]:
        ends = [*self._starts[1:], len(self._written)]
        texts = [self._written[a:b].strip() for a, b in zip(self._starts, ends, strict=True)]
        routes = [*self._ended_by, self.route]
        return tuple(Part(text, route) for text, route in zip(texts, routes, strict=True))

    def _write(self, piece: str) -> None:
        self._has_begun = self._sentences.add(piece)
        self.begins = self.begins or self._has_begun
        self._written += piece
        while len(self._routes) < len(self._sentences.all):
            self._routes.append(self.route)

    def _finish(self, ending: Ending) -> str:
        self._write(self._detokenizer.rest())
        self.ending = ending
        found = [place for stop in self._stops if (place := self._written.find(stop)) >= 0]
        if found:
            self._sentences.cut(len(self._written) - min(found))
            self._written = self._written[: min(found)]
        return self._show(self.text)

    @property
    def _stops(self) -> tuple[str, ...]:
        return self.request.sampling.stop

    def _certain(self) -> str:
        """Return the text that no later token takes back."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._written)), 0, -1):
            if any(stop.startswith(self._written[-size:]) for stop in self._stops):
                return self._trimmed(self._written[:-size])
        return self.text

    def _trimmed(self, text: str) -> str:
        """Return a text without white space around it, unless it continues a raw prompt."""
        return text.strip() if self.request.has_template else text

    def _show(self, text: str) -> str:
        """Return what of a text was not shown yet."""
        piece = text[len(self._shown) :]
        self._shown += piece
        return piece


def refusals(number: int, request: Request, error: Exception) -> list[Piece]:
    """Return the only pieces of a request that cannot be answered."""
    failure = as_request_error(error)
    return [
        Piece(number, "", BASE_ROUTE, error=failure, choice=choice) for choice in range(request.n)
    ]


def as_request_error(error: Exception) -> DlpLoraError:
    """Return an error of any kind as one that ends a request."""
    if isinstance(error, DlpLoraError):
        return error
    return RequestFailedError(f"the request failed: {one_line(error)}")
