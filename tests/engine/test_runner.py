"""The runner against its own batches and plain forward passes: requests, sentences, cancelling."""

import hashlib
import json
import threading
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.cache_utils import DynamicCache

from dlplora.engine.answers import Answer
from dlplora.engine.decisions import DecisionLog
from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.errors import GenerationError, RouterError
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import Row
from dlplora.models import Base
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.sampling import Sampling
from dlplora.words import Policy
from tests.device import on_device
from tests.peft_adapters import peft_pool
from tests.tiny import TARGETS, chat_of, tiny_base, tiny_tokenizer

ONE, TWO = Route(("one",), (1.0,), 0.9), Route(("two", "one"), (0.75, 0.25), 0.6)
QUESTIONS = ["what is up ?", "which colour : two a b c d ?", "say red", "sum of one plus two ?"]


class ByStops:
    """A router that answers ONE and TWO in turns, by the full stops that it reads."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def route(self, texts: Sequence[str]) -> list[Route]:
        self.read += texts
        return [TWO if text.count(".") % 2 else ONE for text in texts]


class ByLength:
    """A router without memory: long texts go to TWO."""

    def route(self, texts: Sequence[str]) -> list[Route]:
        return [TWO if len(text) > 15 else ONE for text in texts]


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Base, Pool]]:
    base = tiny_base()
    configs = {
        "one": {"r": 2, "target_modules": TARGETS["llama"]},
        "two": {"r": 4, "target_modules": TARGETS["llama"][:1]},
    }
    pool = Pool(FusedLayers(base.model))
    for adapter in peft_pool(base.model, configs, tmp_path_factory.mktemp("adapters"))[1]:
        pool.add(adapter)
    yield base, pool
    pool.layers.unwrap()


def engine_of(pooled: tuple[Base, Pool], **more: object) -> Runner:
    return Runner(*pooled, **({"router": ByLength()} | more))  # type: ignore[arg-type]


def by_plain_forwards(base: Base, pool: Pool, question: str, route: Route, count: int) -> str:
    """The greedy answer by one whole forward pass a token."""
    ids = list(base.chat.prompt(question))
    start = len(ids)
    for _ in range(count):
        with torch.no_grad(), pool.mixing(pool.mix([route])):
            token = int(base.model(on_device([ids])).logits[0, -1].argmax())
        if token in base.end_ids:
            break
        ids.append(token)
    return base.chat.text(ids[start:])


@pytest.mark.parametrize("max_batch_size", [1, 2, 16])
def test_answers_are_those_of_plain_forwards_whoever_shares_the_batch(
    pooled: tuple[Base, Pool], max_batch_size: int
) -> None:
    requests = [
        Request(question, Sampling(max_new_tokens=3 + 4 * number))
        for number, question in enumerate(QUESTIONS * 2)
    ]
    answers = engine_of(pooled, max_batch_size=max_batch_size).generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        route = ByLength().route([request.prompt])[0]
        count = request.sampling.max_new_tokens
        assert answer.text == by_plain_forwards(*pooled, request.prompt, route, count)
        assert {sentence.route for sentence in answer.sentences} == {route}
        assert answer.ending in {"length", "end"}


def test_pieces_make_up_the_answer(pooled: tuple[Base, Pool]) -> None:
    pieces = list(engine_of(pooled).stream("say red", sampling=Sampling(max_new_tokens=9)))
    (answer,) = engine_of(pooled).generate(["say red"], sampling=Sampling(max_new_tokens=9))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [piece.answer for piece in pieces] == [None] * (len(pieces) - 1) + [answer]
    assert len(pieces) > 3


def test_a_drawn_answer_is_its_seed_s_own_in_any_batch(pooled: tuple[Base, Pool]) -> None:
    engine = engine_of(pooled)
    requests = [
        Request(question, Sampling(max_new_tokens=12, temperature=2.0, top_k=9, seed=seed))
        for seed, question in enumerate(QUESTIONS)
    ]
    together = [answer.text for answer in engine.generate(requests)]
    assert together == [engine.generate([request])[0].text for request in requests]
    assert together == [answer.text for answer in engine.generate(requests)]
    greedy = [Request(question, Sampling(max_new_tokens=12)) for question in QUESTIONS]
    assert together != [answer.text for answer in engine.generate(greedy)]


def test_an_answer_ends_before_a_stop_string_and_never_shows_it(
    pooled: tuple[Base, Pool],
) -> None:
    engine = engine_of(pooled)
    words = engine.generate(["say red"], sampling=Sampling(max_new_tokens=12))[0].text.split()
    stop = " ".join(words[4:6])
    first = " ".join(words).find(stop)
    sampling = Sampling(max_new_tokens=12, stop=(stop, "never said"))
    pieces = list(engine.stream("say red", sampling=sampling))
    answer = pieces[-1].answer
    assert answer is not None
    assert answer.ending == "stop"
    assert answer.text == " ".join(words)[:first].strip()
    assert [part.text for part in answer.parts] == [answer.text]
    assert "".join(sentence.text for sentence in answer.sentences).strip() == answer.text
    assert "".join(piece.text for piece in pieces) == answer.text


def test_a_cancelled_request_frees_its_place(pooled: tuple[Base, Pool]) -> None:
    engine = engine_of(pooled, max_batch_size=1)
    first = Request("say red", Sampling(max_new_tokens=60))
    second = Request("what is up ?", Sampling(max_new_tokens=5))
    answers = {}
    for number, piece in enumerate(engine.run([first, second])):
        if number == 2:
            first.cancel()
        if piece.answer:
            answers[piece.number] = piece.answer
    assert answers[0].ending == "cancelled"
    assert answers[0].num_tokens < 6
    assert answers[1] == engine.generate([second])[0]


def test_a_request_cancelled_before_its_turn_is_not_read(
    pooled: tuple[Base, Pool],
) -> None:
    first, second = Request("say red", Sampling(max_new_tokens=5)), Request("what is up ?")
    second.cancel()
    read: list[int] = []
    embed = pooled[0].model.get_input_embeddings()
    hook = embed.register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    engine = engine_of(pooled, router=None)
    answers = engine.generate([replace(first, routes=(ONE,)), second])
    hook.remove()
    assert answers[1].ending == "cancelled"
    assert (answers[1].text, answers[1].num_tokens, set(read)) == ("", 0, {1})


def test_a_request_made_of_another_is_cancelled_alone() -> None:
    first = Request("say red")
    other = replace(first, prompt="what is up ?")
    other.cancel()
    assert (first.cancelled.is_set(), other.cancelled.is_set()) == (False, True)


def test_requests_are_taken_when_there_is_a_place(pooled: tuple[Base, Pool]) -> None:
    taken = []

    def requests() -> Iterator[Request]:
        for number in range(6):
            taken.append(number)
            yield Request("say red", Sampling(max_new_tokens=4))

    pieces = engine_of(pooled, max_batch_size=2).run(requests())
    next(pieces)
    assert taken == [0, 1]
    assert {piece.number for piece in pieces if piece.answer} == set(range(6))


@pytest.fixture(scope="module", params=["keep", "refill"])
def sentenced(request: pytest.FixtureRequest, pooled: tuple[Base, Pool]) -> tuple[Request, Answer]:
    """An answer of three sentences whose tokens are all words."""
    sampling = Sampling(max_new_tokens=15, temperature=3.0)
    requests = [
        Request("say red", replace(sampling, seed=seed), policy=request.param)
        for seed in range(900)
    ]
    answers = engine_of(pooled, router=ByStops(), max_batch_size=300).generate(requests)
    return next(
        (request, answer)
        for request, answer in zip(requests, answers, strict=True)
        if len(answer.sentences) > 2
        and len(answer.sentences[-1].text.split()) > 1
        and len(answer.text.split()) == answer.num_tokens
    )


def test_the_router_is_asked_again_when_a_sentence_begins(
    pooled: tuple[Base, Pool], sentenced: tuple[Request, Answer]
) -> None:
    request, answer = sentenced
    router = ByStops()
    assert engine_of(pooled, router=router).generate([request]) == [answer]
    begun, words = ["say red"], 0
    for before, sentence in pairwise(answer.sentences):
        words += len(before.text.split())
        history = answer.text.split()[:words]
        begun.append(f"say red\n{' '.join(history)} {sentence.text.split()[0]}")
    assert router.read == begun
    assert [sentence.route for sentence in answer.sentences] == ByStops().route(begun)


def test_a_sentence_is_written_by_its_own_route(
    pooled: tuple[Base, Pool], sentenced: tuple[Request, Answer]
) -> None:
    """Draw the tokens again, each from a model that reads one token after another."""
    base, pool = pooled
    request, answer = sentenced
    prompt = list(base.chat.prompt("say red"))
    ids, routes = list(prompt), [ONE] * len(prompt)  # by which each token is read
    generator = torch.Generator().manual_seed(request.sampling.seed)
    for sentence in answer.sentences:
        for token in base.chat.answer(sentence.text):
            cache = DynamicCache(config=base.model.config)
            for earlier, route in zip(ids, routes, strict=True):
                by = routes[-1] if request.policy == "refill" else route
                with torch.no_grad(), pool.mixing(pool.mix([by])):
                    output = base.model(
                        on_device([[earlier]]), past_key_values=cache, use_cache=True
                    )
            logits_V = output.logits[0, -1]
            assert int((logits_V / 3).softmax(-1).multinomial(1, generator=generator)) == token
            ids.append(token)
            routes.append(sentence.route)


def test_a_piece_is_told_by_the_route_that_its_sentence_is_written_by(
    pooled: tuple[Base, Pool], sentenced: tuple[Request, Answer]
) -> None:
    request, answer = sentenced
    by_piece: list[tuple[str, Route]] = []
    for piece in engine_of(pooled, router=ByStops()).stream(request):
        by_piece += [(word, piece.route) for word in piece.text.split()]
    by_sentence = [
        (word, sentence.route) for sentence in answer.sentences for word in sentence.text.split()
    ]
    assert by_piece == by_sentence


def test_a_request_that_cannot_be_answered_leaves_the_others_alone(
    pooled: tuple[Base, Pool],
) -> None:
    sampling = Sampling(max_new_tokens=6)
    gone = Route(("gone",), (1.0,))
    requests = [
        Request("say red", sampling, (ONE,)),
        Request("say red", sampling, (gone,)),
        Request("say red", Sampling(max_new_tokens=500), (ONE,)),
        Request("a text that is longer", sampling, (TWO,)),
    ]
    engine = engine_of(pooled, max_batch_size=2)
    last = {p.number: p for p in engine.run(requests) if p.answer or p.error}
    alone = engine.generate([requests[0], requests[3]])
    assert [last[0].answer, last[3].answer] == alone
    assert isinstance(last[1].error, RouterError)
    assert isinstance(last[2].error, GenerationError)
    assert last[1].answer is None
    with pytest.raises(RouterError, match="no adapter 'gone'"):
        engine.generate(requests)
    with pytest.raises(RouterError, match="no adapter 'gone'"):
        list(engine.stream(requests[1]))


def test_without_a_router_only_requests_without_routes_fail(pooled: tuple[Base, Pool]) -> None:
    sampling = Sampling(max_new_tokens=6)
    requests = [Request("say red", sampling, (ONE,)), Request("say red", sampling)]
    engine = Runner(*pooled)
    last = {p.number: p for p in engine.run(requests) if p.answer or p.error}
    assert [last[0].answer] == engine.generate(requests[:1])
    assert isinstance(last[1].error, RouterError)


def test_an_adapter_removed_after_its_prompt_was_routed_still_answers(tmp_path: Path) -> None:
    base = tiny_base()
    configs = {"one": {"r": 2, "target_modules": TARGETS["llama"]}}
    _, adapters = peft_pool(base.model, configs, tmp_path)
    request = Request("say red", Sampling(max_new_tokens=6), (ONE,))

    class Leaving(Pool):
        """A pool that its adapter leaves as soon as a request has it."""

        def row(self, route: Route) -> Row:
            row = super().row(route)
            self.remove("one")
            return row

    answers = []
    for pool in (Pool(FusedLayers(base.model)), Leaving(FusedLayers(tiny_base().model))):
        pool.add(adapters[0])
        answers += Runner(replace(base, model=pool.layers.model), pool).generate([request])
    assert answers[0] == answers[1]
    assert pool.names == ()


def test_a_sentence_whose_route_stays_keeps_an_adapter_that_is_removed(
    sentenced: tuple[Request, Answer], tmp_path: Path
) -> None:
    request = replace(sentenced[0], routes=(ONE,))
    base = tiny_base()
    configs = {"one": {"r": 2, "target_modules": TARGETS["llama"]}}
    pool = Pool(FusedLayers(base.model))
    pool.add(peft_pool(base.model, configs, tmp_path)[1][0])
    (expected,) = Runner(base, pool).generate([request])
    assert len(expected.sentences) > 1
    pieces = Runner(base, pool).run([request])
    next(pieces)
    pool.remove("one")
    (answer,) = [piece.answer for piece in pieces if piece.answer]
    assert answer == expected


def test_a_sentence_routed_to_an_adapter_that_is_gone_ends_its_request_alone(
    pooled: tuple[Base, Pool], sentenced: tuple[Request, Answer]
) -> None:
    request, answer = sentenced

    class ThenGone(ByStops):
        def route(self, texts: Sequence[str]) -> list[Route]:
            found = super().route(texts)
            return [
                Route(("gone",), (1.0,)) if "\n" in text else route
                for text, route in zip(texts, found, strict=True)
            ]

    requests = [request, replace(request, policy="route_once")]
    pieces = list(engine_of(pooled, router=ThenGone()).run(requests))
    (failed,) = [piece for piece in pieces if piece.error]
    assert (failed.number, failed.answer) == (0, None)
    begun = "".join(piece.text for piece in pieces if piece.number == 0)
    assert answer.sentences[0].text.strip() in begun
    (finished,) = [piece.answer for piece in pieces if piece.answer]
    assert [finished] == engine_of(pooled, router=ByStops()).generate([requests[1]])


def test_route_once_asks_once(pooled: tuple[Base, Pool], sentenced: tuple[Request, Answer]) -> None:
    request, _ = sentenced
    router = ByStops()
    engine_of(pooled, router=router).generate([replace(request, policy="route_once")])
    assert router.read == ["say red"]


def test_the_router_reads_no_more_than_its_window(
    pooled: tuple[Base, Pool], sentenced: tuple[Request, Answer]
) -> None:
    request, _ = sentenced
    router = ByStops()
    engine_of(pooled, router=router, window_chars=6).generate([request])
    assert router.read[0] == "say red"
    assert {len(text) for text in router.read[1:]} == {6}


@pytest.mark.parametrize("policy", ["keep", "refill"])
def test_of_a_numbered_prompt_the_router_reads_the_question_that_is_answered_next(
    pooled: tuple[Base, Pool], policy: Policy
) -> None:
    base, pool = pooled
    with_lines = replace(base, chat=chat_of(tiny_tokenizer(lines=True), ""))
    sampling = Sampling(max_new_tokens=90, temperature=3.0)
    questions = ("say red", "what is the opposite of up ?")
    prompt = "1. say red\n2. what is the opposite of up ?"
    for seed in range(50):
        router = ByStops()
        request = Request(prompt, replace(sampling, seed=seed), policy=policy, num_answers=2)
        (answer,) = Runner(with_lines, pool, router=router).generate([request])
        if answer.ending != "end" or any("." in part.text for part in answer.parts):
            continue
        first = answer.parts[0].text
        assert router.read[0] == questions[0]
        assert questions[1] in router.read
        assert all(text.startswith(questions) for text in router.read)
        assert not any(first and first in text for text in router.read if text[0] == "w")
        return
    pytest.fail("no answer of two lines")


@pytest.mark.parametrize("policy", ["route_once", "keep", "refill"])
def test_a_composite_has_a_line_by_each_of_its_routes(
    pooled: tuple[Base, Pool], policy: Policy
) -> None:
    base, pool = pooled
    with_lines = replace(base, chat=chat_of(tiny_tokenizer(lines=True), ""))
    engine = Runner(with_lines, pool, max_batch_size=50)
    sampling = Sampling(max_new_tokens=90, temperature=3.0)
    routes = (ONE, TWO, BASE_ROUTE)
    requests = [
        Request(
            "say red",
            replace(sampling, seed=seed),
            routes[:1] if policy == "route_once" else routes,
            policy,
            num_answers=3,
        )
        for seed in range(50)
    ]
    ended = [answer for answer in engine.generate(requests) if answer.ending == "end"]
    assert ended
    for answer in ended:
        assert len(answer.parts) == 3
        if policy != "route_once" and [len(part.text.split()) for part in answer.parts] == [
            1,
            1,
            1,
        ]:
            assert [sentence.route for sentence in answer.sentences] == list(routes)
        assert "\n".join(part.text for part in answer.parts).split() == answer.text.split()
        if policy != "route_once":
            assert [part.route for part in answer.parts] == list(routes)
        found = list(dict.fromkeys(sentence.route for sentence in answer.sentences))
        assert found == [route for route in routes if route in found]
    every = {sentence.route for answer in ended for sentence in answer.sentences}
    assert every == ({ONE} if policy == "route_once" else set(routes))


def test_unsure_routes_fall_back_to_the_base_model(pooled: tuple[Base, Pool]) -> None:
    engine = engine_of(pooled, fallback_below=0.7)
    assert engine.route(["short", "a text that is longer"]) == [ONE, Route((), (), 0.6)]
    sampling = Sampling(max_new_tokens=8)
    (answer,) = engine.generate(["a text that is longer"], sampling=sampling)
    assert answer.text == by_plain_forwards(*pooled, "a text that is longer", BASE_ROUTE, 8)


def test_a_request_may_say_itself_when_a_route_is_unsure(pooled: tuple[Base, Pool]) -> None:
    text, sampling = "a text that is longer", Sampling(max_new_tokens=8)
    for policy in ("route_once", "keep", "split"):
        requests = [
            Request(text, sampling, policy=policy, fallback_below=least)
            for least in (None, 0.0, 0.7)
        ]
        by_system, never, often = engine_of(pooled, fallback_below=0.7).generate(requests)
        assert by_system == often
        assert often.text == by_plain_forwards(*pooled, text, BASE_ROUTE, 8)
        assert never == engine_of(pooled).generate([requests[0]])[0]
    for wrong in (2, -0.1, True, "auto"):
        with pytest.raises(GenerationError, match=r"fallback_below is .*, expected none or 0 to 1"):
            Request(text, fallback_below=wrong)  # type: ignore[arg-type]


def test_no_texts_have_no_routes(pooled: tuple[Base, Pool]) -> None:
    assert engine_of(pooled).route([]) == []


def test_every_decision_is_logged(pooled: tuple[Base, Pool], tmp_path: Path) -> None:
    base, texts = pooled[0], ["say red", "a text that is longer"]

    def embed(asked: Sequence[str]) -> NDArray[np.float32]:
        return np.array([[len(text), 0.5] for text in asked], dtype=np.float32)

    full = DecisionLog(tmp_path / "full", system="mine", version="v1", with_text=True, embed=embed)
    engine_of(pooled, log=full, fallback_below=0.7).route(texts)
    engine_of(pooled, log=DecisionLog(tmp_path / "short", system="mine")).route(texts)
    lines = [json.loads(line) for line in (tmp_path / "full").read_text().splitlines()]
    for text, line in zip(texts, lines, strict=True):
        assert line.pop("text") == text
        vector = np.frombuffer(b64decode(line.pop("embedding")), dtype=np.float16)
        assert vector.tolist() == [len(text), 0.5]
        assert line["sha256"] == hashlib.sha256(text.encode()).hexdigest()
        assert line["tokens"] == len(base.chat.prompt(text))
        assert (line["version"], line["system"]) == ("v1", "mine")
        assert line["milliseconds"] >= 0
    assert [line["adapters"] for line in lines] == [["one"], []]
    assert [line["confidence"] for line in lines] == [0.9, 0.6]
    assert [line["fallback"] for line in lines] == [False, True]
    short = [json.loads(line) for line in (tmp_path / "short").read_text().splitlines()]
    assert [line["adapters"] for line in short] == [["one"], ["two", "one"]]
    assert all(set(line) == set(lines[0]) for line in short)


def test_a_log_that_has_grown_is_put_aside_and_the_oldest_is_dropped(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log.jsonl", system="mine", max_mib=0.0004, keep=2)
    for number in range(20):
        log.write(f"text {number}", ONE, fallback=False, num_tokens=number, milliseconds=1.0)
    files = [tmp_path / name for name in ("log.2.jsonl", "log.1.jsonl", "log.jsonl")]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    told = [json.loads(line)["tokens"] for file in files for line in file.read_text().splitlines()]
    assert told == list(range(told[0], 20))
    assert told[0] > 0


def test_a_log_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="cannot be written: Is a directory"):
        DecisionLog(tmp_path, system="mine")


def test_a_decision_that_cannot_be_logged_ends_its_request_alone(
    pooled: tuple[Base, Pool], tmp_path: Path
) -> None:
    log = DecisionLog(tmp_path / "log", system="mine")
    (tmp_path / "log").unlink()
    (tmp_path / "log").mkdir()
    request = Request("say red", Sampling(max_new_tokens=4))
    requests = [replace(request, routes=(ONE,)), request]
    last = {p.number: p for p in engine_of(pooled, log=log).run(requests) if p.answer or p.error}
    assert [last[0].answer] == engine_of(pooled).generate(requests[:1])
    assert isinstance(last[1].error, GenerationError)


def test_options_score_by_the_router_s_route(pooled: tuple[Base, Pool]) -> None:
    base, pool = pooled
    scores = engine_of(pooled).score("say red", ["red", "green blue"])
    prompt = base.chat.prompt("say red")
    for option, logprob in zip(scores.options, scores.logprobs, strict=True):
        ids = base.chat.answer(option)
        with torch.no_grad(), pool.mixing(pool.mix([ONE])):
            rows = base.model(on_device([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        picked = rows.log_softmax(-1)[range(len(ids)), list(ids)]
        assert logprob == pytest.approx(float(picked.sum()), abs=1e-4)


@pytest.mark.parametrize("options", [[], ["red", ""]])
def test_options_without_text_are_refused(pooled: tuple[Base, Pool], options: list[str]) -> None:
    with pytest.raises(GenerationError, match="expected texts, none empty"):
        engine_of(pooled).score("say red", options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_answers": 0}, "num_answers is 0"),
        ({"policy": "refil"}, "policy is 'refil', expected one of keep, refill, route_once"),
        ({"routes": (ONE, TWO)}, "2 routes with the policy route_once"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    pooled: tuple[Base, Pool], wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        engine_of(pooled).generate([Request("say red", **wrong)])  # type: ignore[arg-type]


def test_what_does_not_fit_the_model_is_refused(pooled: tuple[Base, Pool]) -> None:
    engine = engine_of(pooled)
    for text, new_tokens in (("say red", 256), ("red " * 300, 2)):
        size = len(engine.base.chat.prompt(text))
        told = (
            f"the prompt has {size} tokens and {new_tokens} may be generated; the model reads 256"
        )
        with pytest.raises(GenerationError, match=told):
            engine.generate([text], sampling=Sampling(max_new_tokens=new_tokens))
    with pytest.raises(GenerationError, match="max_batch_size is 0"):
        engine_of(pooled, max_batch_size=0)
    for name, ask in {
        "prompts": engine.generate,
        "texts": engine.route,
        "options": partial(engine.score, "say red"),
    }.items():
        with pytest.raises(GenerationError, match=f"{name} is one text"):
            ask("red")
    for value in (float("nan"), -0.1, 7.0):
        with pytest.raises(GenerationError, match=f"fallback_below is {value}, expected 0 to 1"):
            engine_of(pooled, fallback_below=value)
    for text, message in (("red \ud83d", "character 5 is '.ud83d'"), (b"red", "is bytes")):
        with pytest.raises(GenerationError, match=message):
            engine.route([text])  # type: ignore[list-item]
        with pytest.raises(GenerationError, match=message):
            engine.generate([text])  # type: ignore[list-item]
    bare = replace(pooled[0], chat=chat_of(tiny_tokenizer(template=None), ""))
    with pytest.raises(GenerationError, match="the prompt is empty"):
        Runner(bare, pooled[1], router=ByLength()).generate([""])


def test_without_a_router_a_request_must_bring_its_route(pooled: tuple[Base, Pool]) -> None:
    engine = engine_of(pooled, router=None)
    with pytest.raises(RouterError, match="the engine has no router"):
        engine.generate(["say red"])
    with pytest.raises(RouterError, match="no adapter 'three'; there are: one, two"):
        engine.generate([Request("say red", routes=(Route(("three",), (1.0,)),))])


def test_threads_share_an_engine_and_get_their_own_answers(pooled: tuple[Base, Pool]) -> None:
    engine = engine_of(pooled)
    sampling = Sampling(max_new_tokens=15)
    expected = {q: engine.generate([q], sampling=sampling) for q in QUESTIONS}
    found: dict[str, list[object]] = {q: [] for q in QUESTIONS}

    def ask(question: str) -> None:
        for _ in range(5):
            found[question].append(engine.generate([question], sampling=sampling))

    threads = [threading.Thread(target=ask, args=(question,)) for question in QUESTIONS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {question: [answers] * 5 for question, answers in expected.items()}


def test_sequences_whose_caches_cannot_be_joined_are_written_beside_one_another() -> None:
    base = tiny_base("sliding")
    requests = [
        Request(question, Sampling(max_new_tokens=4 + 5 * number), routes=(BASE_ROUTE,))
        for number, question in enumerate(QUESTIONS * 2)
    ]
    engine = Runner(base, Pool(FusedLayers(base.model)), max_batch_size=2)
    for request, answer in zip(requests, engine.generate(requests), strict=True):
        count = request.sampling.max_new_tokens
        expected = by_plain_forwards(base, engine.pool, request.prompt, BASE_ROUTE, count)
        assert answer.text == expected
