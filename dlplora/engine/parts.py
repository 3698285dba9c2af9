"""A request of several questions: each is answered as a request of its own, and put in order."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

from dlplora.engine.answers import Answer, Ending, Part, Piece
from dlplora.engine.requests import Message, Request
from dlplora.engine.segments import Segment
from dlplora.errors import GenerationError
from dlplora.records.routes import Route
from dlplora.sampling import Sampling

if TYPE_CHECKING:
    from dlplora.engine.routing import RequestRouter


# Of several answers, the ending that tells most comes first.
_ENDINGS: tuple[Ending, ...] = ("cancelled", "length", "stop", "end")


@dataclass
class _Question:
    """One question: what was written of its answer and not shown yet, and how it ended."""

    segment: Segment
    waiting: list[Piece] = field(default_factory=list)
    answer: Answer | None = None


class Parts:
    """The parts of one request, answered side by side; pieces come out in the order of questions.

    Args:
        number: The request's number.
        request: What was asked.
        segments: Its questions, two or more.
        routes: The route of each; none where a probe is to choose.
    """

    def __init__(
        self, number: int, request: Request, segments: Sequence[Segment], routes: Sequence[Route]
    ) -> None:
        self._number = number
        self._request = request
        self._routes = routes
        self._parts = [_Question(segment) for segment in segments]
        self._shown = 0  # the part that is being shown
        self._has_begun = False  # its number stands there
        self._is_over = False

    @property
    def first(self) -> range:
        """The places of the questions that can be asked at once."""
        return range(1 if self._request.visible == "own_and_answers" else len(self._parts))

    def after(self, place: int) -> int | None:
        """Return the place of the question that waits for the answer to one."""
        waits = self._request.visible == "own_and_answers" and place + 1 < len(self._parts)
        return place + 1 if waits else None

    def add(self, place: int, piece: Piece) -> list[Piece]:
        """Take a piece of one part; return what of the whole answer became certain by it."""
        if self._is_over:
            return []
        if piece.error is not None:
            self._is_over = True
            return [replace(piece, number=self._number, text="")]
        part = self._parts[place]
        part.waiting.append(piece)
        part.answer = piece.answer
        return self._show()

    def request(self, place: int) -> Request:
        """Return what asks one question alone, or behind what it may see besides."""
        asked, part = self._request, self._parts[place]
        before = asked.prompt[:-1] if isinstance(asked.prompt, tuple) else ()
        text = part.segment.text
        if asked.visible == "all":
            text = f"{asked.last_turn}\n\n{text}"
        elif asked.visible == "own_and_answers":
            for one in self._parts[:place]:
                assert one.answer is not None
                before = (
                    *before,
                    Message("user", one.segment.text),
                    Message("assistant", one.answer.text),
                )
        prompt = (*before, Message("user", text)) if before else text
        return asked.changed(
            prompt=prompt,
            sampling=_shared(asked, len(self._parts)),
            routes=tuple(self._routes[place : place + 1]),
            policy="route_once",
            num_answers=1,
        )

    def _show(self) -> list[Piece]:
        shown: list[Piece] = []
        while self._shown < len(self._parts):
            part = self._parts[self._shown]
            for piece in part.waiting:
                text = piece.text
                if not self._has_begun:
                    text = f"{self._front(self._shown)}{text}"
                    self._has_begun = True
                shown.append(replace(piece, number=self._number, text=text, answer=None))
            part.waiting = []
            if part.answer is None:
                return shown
            self._shown += 1
            self._has_begun = False
        self._is_over = True
        return [*shown[:-1], replace(shown[-1], answer=self._answer())]

    def _front(self, place: int) -> str:
        """Return what stands before an answer: a line break, and the number of its question."""
        label = self._parts[place].segment.label
        return ("\n" if place else "") + (f"{label} " if label else "")

    def _answer(self) -> Answer:
        answers = [part.answer for part in self._parts if part.answer is not None]
        endings = {answer.ending for answer in answers}
        return Answer(
            text="".join(self._front(place) + one.text for place, one in enumerate(answers)),
            parts=tuple(
                Part(
                    one.text,
                    one.parts[0].route,
                    question=part.segment.text,
                    ending=one.ending,
                )
                for part, one in zip(self._parts, answers, strict=True)
            ),
            sentences=tuple(sentence for one in answers for sentence in one.sentences),
            ending=next(ending for ending in _ENDINGS if ending in endings),
            num_tokens=sum(one.num_tokens for one in answers),
            num_prompt_tokens=sum(one.num_prompt_tokens for one in answers),
            num_cached_tokens=sum(one.num_cached_tokens for one in answers),
            tokens=tuple(token for one in answers for token in one.tokens),
            prompt_tokens=tuple(token for one in answers for token in one.prompt_tokens),
        )


def _shared(request: Request, count: int) -> Sampling:
    """Return how one of so many questions is answered: with its share of `max_total_tokens`."""
    told, total = request.sampling, request.max_total_tokens
    if total is None:
        return told
    if total < count:
        raise GenerationError(
            f"max_total_tokens is {total}, expected at least one for each of {count} questions"
        )
    return replace(told, max_new_tokens=min(told.max_new_tokens, total // count))


class Splitter:
    """Splits prompts of the policy `split` into requests, and joins their pieces.

    Requests of questions have numbers below 0, unlike others.
    """

    def __init__(self) -> None:
        self._numbers = count(1)
        self._parts: dict[int, tuple[Parts, int]] = {}

    def split(
        self, number: int, request: Request, router: "RequestRouter"
    ) -> list[tuple[int, Request]]:
        """Return what is to be asked at first: the request itself, or some of its questions.

        Raises `GenerationError` if the prompt cannot be split as it asks.
        """
        if router.policy_of(request) != "split":
            return [(number, request)]
        segments, routes = router.split(request)
        if not segments:
            whole = request.changed(
                policy="route_once",
                sampling=_shared(request, 1),
                routes=request.routes or tuple(routes),
            )
            return [(number, whole)]
        parts = Parts(number, request, segments, routes)
        return [self._numbered(parts, place) for place in parts.first]

    def join(self, pieces: Sequence[Piece]) -> tuple[list[Piece], list[tuple[int, Request]]]:
        """Return the pieces of whole requests, and the questions that can be asked now."""
        joined: list[Piece] = []
        asked: list[tuple[int, Request]] = []
        for piece in pieces:
            if piece.number not in self._parts:
                joined.append(piece)
                continue
            parts, place = self._parts[piece.number]
            joined += parts.add(place, piece)
            if piece.answer is not None and (after := parts.after(place)) is not None:
                asked.append(self._numbered(parts, after))
            if piece.answer is not None or piece.error is not None:
                del self._parts[piece.number]
        return joined, asked

    def _numbered(self, parts: Parts, place: int) -> tuple[int, Request]:
        number = -next(self._numbers)
        self._parts[number] = (parts, place)
        return number, parts.request(place)
