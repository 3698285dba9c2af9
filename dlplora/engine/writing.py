"""One answer in the making: its tokens, its text, its sentences and their routes."""

from collections import deque
from collections.abc import Sequence

import torch

from dlplora.data.prompts import ChatFormat
from dlplora.engine.answers import Answer, Ending, Passage, Request
from dlplora.engine.pieces import Pieces
from dlplora.engine.sentences import Sentences
from dlplora.errors import DlpLoraError
from dlplora.lora.mix import Row
from dlplora.records.routes import Route
from dlplora.sampling import Sampler
from dlplora.words import Policy


class Writing:
    """One request's answer so far. `ids` are the tokens of prompt and answer."""

    def __init__(
        self,
        request: Request,
        number: int,
        prompt: Sequence[int],
        route: Route,
        row: Row,
        chat: ChatFormat,
        *,
        policy: Policy,
        end_ids: frozenset[int],
        device: torch.device,
        language: str,
    ) -> None:
        self.request = request
        self.policy = policy
        self.number = number
        self.route = route
        self.row = row  # the adapters of the route, taken when it was chosen
        self.ids = list(prompt)
        self.sampler = Sampler(request.sampling, device=device)
        self._starts = [0]  # where in the text the answers of a composite prompt begin …
        self._ended_by: list[Route] = []  # … and the routes that they ended by
        self.ending: Ending | None = None
        self.error: DlpLoraError | None = None  # what ended it without an answer
        self.begins = False  # the router is to be asked: a sentence or an answer has begun …
        self._has_begun = False  # … and it was a sentence, with the last token
        self._chat = chat
        self._start = len(prompt)
        self._end_ids = end_ids
        self._forced: deque[int] = deque()
        self._pieces = Pieces(chat)
        self._sentences = Sentences(language)
        self._routes: list[Route] = []
        self._written = ""
        self._shown = ""

    @property
    def is_open(self) -> bool:
        """Tell whether there is more to write."""
        return self.ending is None and self.error is None

    @property
    def num_ended(self) -> int:
        """How many answers of a composite prompt were ended before the open one."""
        return len(self._starts) - 1

    @property
    def text(self) -> str:
        """The answer so far, its last word perhaps unfinished."""
        return self._written.strip()

    def accept(self, token: int) -> str:
        """Append a token that the model chose; return the text that is certain by it."""
        self.begins = False
        if self._forced:
            token = self._forced.popleft()
        elif token in self._end_ids:
            if len(self._starts) == self.request.num_answers:
                return self._finish("end")
            self._forced = deque(self._chat.answer("\n") or [token])
            token = self._forced.popleft()
            self._ended_by.append(self.route)
            self._starts.append(len(self._written))
            self.begins = True
        self.ids.append(token)
        self._write(self._pieces.add(token))
        if any(stop in self._written for stop in self._stops):
            return self._finish("stop")
        if len(self.ids) - self._start >= self.request.sampling.max_new_tokens:
            return self._finish("length")
        return self._show(self._certain())

    def cancel(self) -> str:
        """End the answer here."""
        return self._finish("cancelled")

    def reroute(self, route: Route, row: Row) -> None:
        """Go on by another route; a sentence that has just begun is written by it."""
        if route.mix != self.route.mix:
            self.row = row
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
            num_tokens=len(self.ids) - self._start,
        )

    def _parts(self) -> tuple[Passage, ...]:
        ends = [*self._starts[1:], len(self._written)]
        texts = [self._written[a:b].strip() for a, b in zip(self._starts, ends, strict=True)]
        routes = [*self._ended_by, self.route]
        return tuple(Passage(text, route) for text, route in zip(texts, routes, strict=True))

    def _write(self, piece: str) -> None:
        self._has_begun = self._sentences.add(piece)
        self.begins = self.begins or self._has_begun
        self._written += piece
        while len(self._routes) < len(self._sentences.all):
            self._routes.append(self.route)

    def _finish(self, ending: Ending) -> str:
        self._write(self._pieces.rest())
        self.ending = ending
        found = [place for stop in self._stops if (place := self._written.find(stop)) >= 0]
        if found:
            self._sentences.cut(len(self._written) - min(found))
            self._written = self._written[: min(found)]
        return self._show(self._written.strip())

    @property
    def _stops(self) -> Sequence[str]:
        return self.request.sampling.stop

    def _certain(self) -> str:
        """Return the text that no later token takes back."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self._written)), 0, -1):
            if any(stop.startswith(self._written[-size:]) for stop in self._stops):
                return self._written[:-size].strip()
        return self._written.strip()

    def _show(self, text: str) -> str:
        """Return what of a text was not shown yet."""
        piece = text[len(self._shown) :]
        self._shown += piece
        return piece
