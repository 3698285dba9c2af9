"""Prompts that are split into their questions: each is answered as if it had been asked alone."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from dlplora.engine.answers import Answer
from dlplora.engine.requests import Message, Request
from dlplora.engine.runner import Runner
from dlplora.errors import GenerationError, PromptTooLongError, RouterError
from dlplora.lora.attach import Pool
from dlplora.models import Base
from dlplora.records.routes import Route
from dlplora.sampling import Sampling
from tests.engine.requests_of import BOTH, ONE, finished, pooled_base

Pooled = tuple[Base, Pool]
SHORT = Sampling(max_new_tokens=8)
QUESTIONS = ("what is up ?", "which colour : two ?", "say red")
LISTED = "\n".join(f"{n}. {text}" for n, text in enumerate(QUESTIONS, start=1))


class ByWord:
    """A router that is sure of single questions: those of colours go to BOTH."""

    def route(self, texts: Sequence[str]) -> list[Route]:
        return [
            replace(
                BOTH if "colour" in text else ONE, confidence=0.9 if text.count(" ") < 6 else 0.3
            )
            for text in texts
        ]


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pooled]:
    base, pool, _ = pooled_base(tmp_path_factory.mktemp("adapters"))
    yield base, pool
    pool.layers.unwrap()


def runner_of(pooled: Pooled, **more: Any) -> Runner:
    return Runner(*pooled, **({"router": ByWord(), "policy": "split", "cache_mib": 0} | more))


def alone(pooled: Pooled, prompts: Sequence[Any], **told: Any) -> list[Answer]:
    runner = runner_of(pooled, policy="route_once")
    return [
        answer
        for prompt in prompts
        for answer in runner.generate([Request(prompt, **({"sampling": SHORT} | told))])
    ]


@pytest.mark.parametrize("max_batch_size", [1, 2, 16])
def test_each_question_is_answered_as_if_asked_alone(pooled: Pooled, max_batch_size: int) -> None:
    runner = runner_of(pooled, max_batch_size=max_batch_size)
    expected = alone(pooled, QUESTIONS)
    asked = [Request(LISTED, SHORT), Request("say blue", SHORT), Request(LISTED, SHORT)]
    first, single, last = runner.generate(asked)
    assert first == last
    assert [part.text for part in first.parts] == [one.text for one in expected]
    assert [part.route.mix for part in first.parts] == [ONE.mix, BOTH.mix, ONE.mix]
    assert [part.question for part in first.parts] == list(QUESTIONS)
    assert [part.ending for part in first.parts] == [one.ending for one in expected]
    assert first.text == "\n".join(f"{n}. {a.text}" for n, a in enumerate(expected, start=1))
    assert first.num_tokens == sum(one.num_tokens for one in expected)
    assert first.num_prompt_tokens == sum(one.num_prompt_tokens for one in expected)
    assert [single] == alone(pooled, ["say blue"])


def test_pieces_come_in_the_order_of_the_questions(pooled: Pooled) -> None:
    pieces = list(runner_of(pooled).stream(Request(LISTED, SHORT)))
    (answer,) = [piece.answer for piece in pieces if piece.answer]
    assert pieces[-1].answer == answer
    assert "".join(piece.text for piece in pieces) == answer.text
    assert {piece.number for piece in pieces} == {0}


def test_the_last_turn_of_a_chat_is_split_and_those_before_it_are_context(pooled: Pooled) -> None:
    before = (Message("user", "say a"), Message("assistant", "a"))
    (answer,) = runner_of(pooled).generate([Request((*before, Message("user", LISTED)), SHORT)])
    chats = [(*before, Message("user", text)) for text in QUESTIONS]
    expected = alone(pooled, chats, route_on="last_turn")
    assert [part.text for part in answer.parts] == [one.text for one in expected]


def test_a_question_may_see_the_answers_before_it_or_all_of_the_prompt(pooled: Pooled) -> None:
    seeing = replace(Request(LISTED, SHORT), visible="own_and_answers")
    (answer,) = runner_of(pooled).generate([seeing])
    turns: tuple[Message, ...] = ()
    for question, part in zip(QUESTIONS, answer.parts, strict=True):
        turns = (*turns, Message("user", question))
        (expected,) = alone(pooled, [turns], route_on="last_turn")
        assert part.text == expected.text
        turns = (*turns, Message("assistant", part.text))

    (answer,) = runner_of(pooled).generate([replace(seeing, visible="all")])
    for question, part in zip(QUESTIONS, answer.parts, strict=True):
        routes = (replace(part.route, confidence=None),)
        (expected,) = alone(pooled, [f"{LISTED}\n\n{question}"], routes=routes)
        assert part.text == expected.text


def test_routes_of_the_caller_are_those_of_the_questions(pooled: Pooled) -> None:
    routes = (BOTH, ONE, BOTH)
    (answer,) = runner_of(pooled).generate([Request(LISTED, SHORT, routes)])
    assert tuple(part.route for part in answer.parts) == routes
    for question, part, route in zip(QUESTIONS, answer.parts, routes, strict=True):
        assert [part.text] == [one.text for one in alone(pooled, [question], routes=(route,))]


def test_unsure_questions_go_to_the_base_model(pooled: Pooled) -> None:
    runner = runner_of(pooled, fallback_below=0.95)
    (answer,) = runner.generate([Request(LISTED, SHORT)])
    assert [part.route.adapters for part in answer.parts] == [()] * 3


def test_a_limit_of_all_tokens_is_shared(pooled: Pooled) -> None:
    endless = replace(SHORT, ignore_eos=True)
    (answer,) = runner_of(pooled).generate([Request(LISTED, endless, max_total_tokens=10)])
    assert [part.ending for part in answer.parts] == ["length"] * 3
    assert (answer.num_tokens, answer.ending) == (9, "length")


def test_a_prompt_that_is_left_whole_can_be_cancelled(pooled: Pooled) -> None:
    request = Request("say red", Sampling(max_new_tokens=100, ignore_eos=True))
    scheduler = runner_of(pooled).scheduler()
    scheduler.add(request)
    scheduler.step()
    request.cancel()
    answer = finished(scheduler, steps=3)[0, 0]
    assert isinstance(answer, Answer)
    assert answer.ending == "cancelled"


def test_what_arrives_while_the_router_looks_is_split_too(pooled: Pooled) -> None:
    scheduler = runner_of(pooled).scheduler()

    class Adding(ByWord):
        """A router during whose first look another request arrives."""

        has_added = False

        def route(self, texts: Sequence[str]) -> list[Route]:
            if not self.has_added:
                self.has_added = True
                scheduler.add(Request(LISTED, SHORT))
            return super().route(texts)

    scheduler = runner_of(pooled, router=Adding()).scheduler()
    scheduler.add(Request(LISTED, SHORT))
    ends = finished(scheduler)
    assert ends[0, 0] == ends[1, 0]
    assert len(ends[1, 0].parts) == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("prompt", ["what is up ? say red", LISTED, "say red"])
def test_no_text_is_routed_twice(pooled: Pooled, prompt: str) -> None:
    read: list[str] = []

    class Reading(ByWord):
        """A router that tells what it was asked, unsure of all but short texts."""

        def route(self, texts: Sequence[str]) -> list[Route]:
            read.extend(texts)
            return super().route(texts)

    expected = runner_of(pooled).generate([Request(prompt, SHORT)])
    assert runner_of(pooled, router=Reading()).generate([Request(prompt, SHORT)]) == expected
    assert len(read) == len(set(read))


def test_one_route_and_several_answers_leave_a_prompt_whole(pooled: Pooled) -> None:
    runner = runner_of(pooled)
    for told in ({"routes": (BOTH,)}, {"n": 2, "sampling": replace(SHORT, temperature=1.0)}):
        asked = Request(**({"prompt": LISTED, "sampling": SHORT} | told))  # type: ignore[arg-type]
        whole = runner_of(pooled, policy="route_once").generate([asked])
        assert runner.generate([asked]) == whole


def test_without_a_router_nothing_is_answered(pooled: Pooled) -> None:
    with pytest.raises(RouterError, match="the engine has no router"):
        runner_of(pooled, router=None).generate([Request(LISTED, SHORT)])


def test_raw_text_and_token_ids_are_left_whole(pooled: Pooled) -> None:
    for told in ({"prompt": LISTED, "raw": True}, {"prompt": (5, 6, 7)}):
        (answer,) = runner_of(pooled).generate([Request(sampling=SHORT, **told)])  # type: ignore[arg-type]
        assert len(answer.parts) == 1


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"num_answers": 4}, "num_answers asks for 4 questions; the prompt holds 3"),
        (
            {"prompt": "say red", "num_answers": 2},
            "num_answers asks for 2 questions; the prompt holds 1",
        ),
        ({"routes": (ONE, BOTH)}, "routes asks for 2 questions; the prompt holds 3"),
        ({"max_total_tokens": 2}, "max_total_tokens is 2, expected at least one for each of 3"),
        ({"prompt": "\n".join(f"{n}. say red" for n in range(1, 101))}, "100 questions, expected"),
    ],
)
def test_what_cannot_be_split_is_refused_and_others_are_answered(
    pooled: Pooled, told: dict[str, Any], message: str
) -> None:
    runner = runner_of(pooled)
    scheduler = runner.scheduler()
    scheduler.add(Request(**({"prompt": LISTED, "sampling": SHORT} | told)))
    scheduler.add(Request(LISTED, SHORT))
    ends = finished(scheduler)
    errors = [end for (number, _), end in ends.items() if number == 0]
    assert all(isinstance(error, GenerationError) for error in errors)
    assert message in str(errors[0])
    assert [ends[1, 0]] == runner.generate([Request(LISTED, SHORT)])


def test_a_question_that_fails_ends_its_request(pooled: Pooled) -> None:
    scheduler = runner_of(pooled).scheduler()
    scheduler.add(Request(f"1. say red\n2. say {'a ' * 400}\n3. say blue", SHORT, (ONE,) * 3))
    scheduler.add(Request("say red", SHORT))
    ends = finished(scheduler)
    assert isinstance(ends[0, 0], PromptTooLongError)
    assert [ends[1, 0]] == alone(pooled, ["say red"])


@pytest.mark.parametrize("visible", ["own", "own_and_answers"])
def test_a_split_prompt_that_is_cancelled_ends_with_what_was_written(
    pooled: Pooled, visible: Any
) -> None:
    request = Request(LISTED, replace(SHORT, ignore_eos=True), visible=visible)
    scheduler = runner_of(pooled).scheduler()
    scheduler.add(request)
    for _ in range(4):
        scheduler.step()
    request.cancel()
    answer = finished(scheduler)[0, 0]
    assert isinstance(answer, Answer)
    assert answer.ending == "cancelled"
    assert len(answer.parts) == 3
    assert answer.parts[0].text
