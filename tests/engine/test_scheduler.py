"""The scheduler: requests that arrive, wait, are read in parts, fail and leave as if alone."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlplora.engine.answers import Answer
from dlplora.engine.requests import Request
from dlplora.engine.routing import RequestRouter
from dlplora.engine.runner import Runner
from dlplora.errors import GenerationError, RouterError
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import BatchMix
from dlplora.models import Base
from dlplora.records.routes import BASE_ROUTE, PER_TOKEN, Route
from dlplora.routing.simple import ConstantRouter
from dlplora.sampling import Sampling
from dlplora.systems.arrow import ArrowPool, arrow_layers
from tests.device import on_device
from tests.engine.requests_of import (
    BOTH,
    ONE,
    QUESTIONS,
    ByLength,
    alone,
    finished,
    forwards,
    plain_logits,
    pooled_base,
)
from tests.peft_adapters import peft_pool
from tests.systems.test_arrow import ENTRY
from tests.tiny import TARGETS, tiny_base, tiny_model

SHORT = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Base, Pool]]:
    base, pool, _ = pooled_base(tmp_path_factory.mktemp("adapters"))
    yield base, pool
    pool.layers.unwrap()


def runner_of(pooled: tuple[Base, Pool], **more: object) -> Runner:
    return Runner(*pooled, **({"router": ByLength()} | more))  # type: ignore[arg-type]


def test_a_request_that_arrives_later_is_answered_beside_the_others(
    pooled: tuple[Base, Pool],
) -> None:
    runner = runner_of(pooled, cache_mib=0)
    scheduler = runner.scheduler()
    long = Request("say red", Sampling(max_new_tokens=40))
    late = Request("what is up ?", SHORT)
    assert scheduler.step() == []  # nothing waits for a request
    scheduler.add(long)
    for _ in range(5):
        scheduler.step()
    number = scheduler.add(late)
    steps, found = 0, None
    while found is None:
        steps += 1
        found = next((p.answer for p in scheduler.step() if p.number == number and p.answer), None)
    assert steps <= 1 + SHORT.max_new_tokens
    assert [found] == alone(runner, late)
    assert [*finished(scheduler).values()] == alone(runner, long)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_long_prompt_is_read_in_parts_and_the_others_wait_for_one_at_most(
    pooled: tuple[Base, Pool], num_steps: int
) -> None:
    runner = runner_of(pooled, prefill_tokens=16, cache_mib=0)
    long = Request("red " * 100, SHORT)
    first, second = Request("say red", Sampling(max_new_tokens=30)), Request("what is up ?", SHORT)
    expected = [alone(runner, request)[0] for request in (first, long, second)]
    scheduler = runner.scheduler()
    read = forwards(pooled[0])
    scheduler.add(first)
    scheduler.step()
    scheduler.add(long)
    for _ in range(num_steps):
        read.clear()
        scheduler.step()
        assert sum(rows * columns for rows, columns in read) <= 16 + 1
        assert (1, 1) in read  # the first got its token
    number, steps = scheduler.add(second), 0
    while not any(piece.number == number for piece in scheduler.step()):
        steps += 1
    assert steps == 0  # not the rest of the long prompt
    found = finished(scheduler)
    assert [found[0, 0], found[1, 0], found[2, 0]] == expected


@pytest.mark.parametrize("when", ["waiting", "reading", "writing"])
def test_a_cancelled_request_ends_with_the_next_step_and_leaves_its_place(
    pooled: tuple[Base, Pool], when: str
) -> None:
    runner = runner_of(pooled, prefill_tokens=16, max_batch_size=1, cache_mib=0)
    scheduler = runner.scheduler()
    request = Request("red " * 60, Sampling(max_new_tokens=50), n=1)
    if when == "waiting":
        scheduler.add(Request("say red", SHORT))
        scheduler.step()
    number = scheduler.add(request)
    for _ in range({"waiting": 0, "reading": 2, "writing": 12}[when]):
        scheduler.step()
    request.cancel()
    other = Request("what is up ?", SHORT)
    scheduler.add(other)
    (ended,) = [p.answer for p in scheduler.step() if p.number == number and p.answer]
    assert ended.ending == "cancelled"
    assert (ended.num_tokens > 0) == (when == "writing")
    assert alone(runner, other)[0] in finished(scheduler).values()
    assert (scheduler.num_free, scheduler.num_waiting) == (1, 0)


def test_a_text_that_the_router_fails_at_ends_its_request_alone(pooled: tuple[Base, Pool]) -> None:
    class Failing(ByLength):
        def route(self, texts: Sequence[str]) -> list[Route]:
            if any("left" in text for text in texts):
                raise ZeroDivisionError("no left")
            return super().route(texts)

    runner = runner_of(pooled, router=Failing())
    scheduler = runner.scheduler()
    for question in QUESTIONS:
        scheduler.add(Request(question, SHORT))
    found = finished(scheduler)
    for number, question in enumerate(QUESTIONS):
        if "left" in question:
            assert isinstance(found[number, 0], GenerationError)
            assert "the request failed: ZeroDivisionError: no left" in str(found[number, 0])
        else:
            assert [found[number, 0]] == alone(runner, Request(question, SHORT))


def test_a_router_whose_weights_do_not_sum_to_one_is_refused(pooled: tuple[Base, Pool]) -> None:
    router = ConstantRouter(Route(("one",), (0.5,)))
    with pytest.raises(RouterError, match=r"weights of a route sum to 0\.5, not to 1"):
        runner_of(pooled, router=router).generate(["say red"])


def test_a_caller_s_mix_may_have_any_finite_weights(pooled: tuple[Base, Pool]) -> None:
    base, pool = pooled
    route = Route(("one", "two"), (-0.5, 1.75))
    (answer,) = runner_of(pooled).generate([Request("say red", SHORT, (route,))])
    ids = list(base.chat.prompt("say red"))
    start = len(ids)
    while len(ids) - start < 6:
        token = int(plain_logits(base, pool, ids, route)[-1].argmax())
        if token in base.end_ids:
            break
        ids.append(token)
    assert answer.text == base.chat.text(ids[start:])
    for weight in (float("nan"), float("inf")):
        with pytest.raises(RouterError, match="expected finite numbers"):
            Route(("one",), (weight,))


def test_requests_of_several_systems_share_a_batch(pooled: tuple[Base, Pool]) -> None:
    base, pool = pooled
    systems = {
        "one": RequestRouter(base, pool, ConstantRouter(ONE)),
        "base": RequestRouter(base, Pool(pool.layers), ConstantRouter(BASE_ROUTE)),
    }
    runner = runner_of(pooled, name="by_length", systems=systems, cache_mib=0)
    names = [None, "one", "base", "by_length"]
    requests = [Request(QUESTIONS[1], SHORT, system=name) for name in names]
    read = forwards(base)
    answers = runner.generate(requests)
    assert (4, 1) in read
    routes = [BOTH, ONE, BASE_ROUTE, BOTH]
    told = [Request(QUESTIONS[1], SHORT, (route,)) for route in routes]
    assert [answer.text for answer in answers] == [
        alone(runner, request)[0].text for request in told
    ]
    with pytest.raises(GenerationError, match="no system 'two'; there are: base, by_length, one"):
        runner.generate([Request("say red", system="two")])


def test_arrow_runs_in_a_batch_of_its_own_beside_the_others(tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": TARGETS["llama"]}
    peft_pool(tiny_model(), {"one": config, "two": config}, tmp_path)
    base = tiny_base()
    layers = arrow_layers(base, [tmp_path / "one", tmp_path / "two"], entry=ENTRY, seed=0)
    pool = Pool(FusedLayers(base.model))
    arrow = ArrowPool(pool.layers, layers)
    systems = {"arrow": RequestRouter(base, arrow, ConstantRouter(PER_TOKEN))}
    runner = Runner(base, pool, router=ConstantRouter(BASE_ROUTE), systems=systems, cache_mib=0)
    requests = [
        Request(question, SHORT, system=name)
        for question in QUESTIONS[:3]
        for name in (None, "arrow")
    ]
    together = runner.generate(requests)
    assert together == [runner.generate([request])[0] for request in requests]
    for plain, weighed, question in zip(together[::2], together[1::2], QUESTIONS, strict=False):
        ids = list(base.chat.prompt(question))
        for row, answer in ((layers, weighed), ((), plain)):
            with pool.mixing(BatchMix([row])):
                token = int(base.model(on_device([ids])).logits[0, -1].argmax())
            assert answer.text.startswith(base.chat.text([token]))
    assert together[::2] != together[1::2]


def test_what_is_no_request_is_refused_and_the_others_are_answered(
    pooled: tuple[Base, Pool],
) -> None:
    runner = runner_of(pooled)
    scheduler = runner.scheduler()
    asked = Request("say red", SHORT)
    scheduler.add(asked)
    with pytest.raises(GenerationError, match="a request is str, expected a Request"):
        scheduler.add("say red")  # type: ignore[arg-type]
    assert list(finished(scheduler).values()) == alone(runner, asked)
    with pytest.raises(GenerationError, match="a request is str, expected a Request"):
        list(runner.run(["say red"]))  # type: ignore[list-item]
    with pytest.raises(GenerationError, match="an option is NoneType, expected a text"):
        runner.score("say red", [None])  # type: ignore[list-item]


def test_requests_from_other_threads_are_all_answered(pooled: tuple[Base, Pool]) -> None:
    runner = runner_of(pooled, max_batch_size=3, cache_mib=0)
    expected = {q: alone(runner, Request(q, SHORT))[0] for q in QUESTIONS}
    scheduler = runner.scheduler()
    asked: dict[int, str] = {}

    def ask(question: str) -> None:
        for _ in range(10):
            asked[scheduler.add(Request(question, SHORT))] = question

    threads = [threading.Thread(target=ask, args=(question,)) for question in QUESTIONS]
    for thread in threads:
        thread.start()
    found: dict[int, Answer] = {}
    while any(thread.is_alive() for thread in threads) or not scheduler.is_idle:
        found |= {p.number: p.answer for p in scheduler.step() if p.answer}
    for thread in threads:
        thread.join()
    found |= {number: end for (number, _), end in finished(scheduler).items()}  # type: ignore[misc]
    assert sorted(found) == list(range(50))
    assert all(found[number] == expected[question] for number, question in asked.items())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_arrives_and_leaves_each_answer_is_that_of_its_request_alone(
    pooled: tuple[Base, Pool], data: st.DataObject
) -> None:
    runner = runner_of(
        pooled,
        prefill_tokens=data.draw(st.sampled_from([5, 16, 512]), "prefill_tokens"),
        max_batch_size=data.draw(st.sampled_from([1, 3, 16]), "max_batch_size"),
        cache_mib=data.draw(st.sampled_from([0, 1]), "cache_mib"),
    )
    scheduler = runner.scheduler()
    requests: dict[int, Request] = {}
    ended: dict[int, Answer] = {}
    for _ in range(data.draw(st.integers(1, 8), "requests")):
        repeats = data.draw(st.sampled_from([1, 1, 8]), "repeats")
        question = " ".join([data.draw(st.sampled_from(QUESTIONS), "question")] * repeats)
        policy = data.draw(st.sampled_from(["route_once", "keep", "refill"]), "policy")
        sampling = Sampling(max_new_tokens=data.draw(st.integers(1, 12), "tokens"))
        request = Request(question, sampling, policy=policy)
        requests[scheduler.add(request)] = request
        if data.draw(st.integers(0, 4), "cancels") == 0:
            data.draw(st.sampled_from(sorted(requests)).map(requests.get), "whom").cancel()
        for _ in range(data.draw(st.integers(0, 4), "steps")):
            ended |= {p.number: p.answer for p in scheduler.step() if p.answer}
    ended |= {number: end for (number, _), end in finished(scheduler).items()}  # type: ignore[misc]
    assert sorted(ended) == sorted(requests)
    for number, request in requests.items():
        fresh = Request(request.prompt, request.sampling, policy=request.policy)
        (expected,) = alone(runner, fresh)
        if ended[number].ending == "cancelled":
            assert request.cancelled.is_set()
            assert expected.text.startswith(ended[number].text)
        else:
            assert ended[number] == expected
    assert scheduler.is_idle


def test_a_mix_too_large_for_numbers_ends_its_request_alone(pooled: tuple[Base, Pool]) -> None:
    runner = runner_of(pooled, cache_mib=0)
    fine = Request("say red", SHORT)
    for weight in (1e38, 1e300):
        for temperature in (0.0, 1.0):
            sampling = Sampling(max_new_tokens=6, temperature=temperature)
            wild = Request("say red", sampling, (Route(("one",), (weight,)),), n=2)
            scheduler = runner.scheduler()
            scheduler.add(wild)
            scheduler.add(fine)
            found = finished(scheduler)
            assert [found[1, 0]] == alone(runner, fine)
            assert all(isinstance(found[0, choice], GenerationError) for choice in range(2))


def test_what_fails_while_it_is_read_or_written_ends_and_what_follows_is_answered(
    pooled: tuple[Base, Pool],
) -> None:
    base, _ = pooled
    runner = runner_of(pooled, cache_mib=0, prefill_tokens=8)
    request = Request("which colour : two a b c d ?", SHORT)
    (expected,) = alone(runner, request)
    for fails_at in (1, 4):  # the second part of the prompt, a token of the answer
        scheduler = runner.scheduler()
        scheduler.add(request)
        calls = iter(range(100))

        def fail(*_: object, at: int = fails_at, calls: Iterator[int] = calls) -> None:
            if next(calls) == at:
                raise MemoryError("no memory")

        hook = base.model.register_forward_pre_hook(fail)
        scheduler.add(request) if fails_at == 4 else None
        found = finished(scheduler)
        hook.remove()
        assert all("no memory" in str(error) for error in found.values())
        number = scheduler.add(request)
        assert finished(scheduler)[number, 0] == expected


def test_nobody_waits_while_there_is_a_place(pooled: tuple[Base, Pool]) -> None:
    runner = runner_of(pooled, max_batch_size=8, cache_mib=0)
    scheduler = runner.scheduler()
    for _ in range(7):
        scheduler.add(Request("say red", Sampling(max_new_tokens=60, ignore_eos=True)))
    for _ in range(3):
        scheduler.step()
    for _ in range(3):
        scheduler.add(Request("what is up ?", SHORT))
    for _ in range(4):
        scheduler.step()
    assert (scheduler.num_free, scheduler.num_waiting) == (0, 2)


def test_once_the_adapters_are_taken_out_nothing_more_is_written(tmp_path: Path) -> None:
    base, pool, _ = pooled_base(tmp_path)
    scheduler = Runner(base, pool, router=ByLength()).scheduler()
    scheduler.add(Request("say red", Sampling(max_new_tokens=60, ignore_eos=True)))
    for _ in range(3):
        scheduler.step()
    pool.layers.unwrap()
    scheduler.add(Request("what is up ?", SHORT))
    found = finished(scheduler)
    assert [type(found[number, 0]) for number in (0, 1)] == [RouterError] * 2
    assert all("taken out of the model" in str(error) for error in found.values())


def test_each_answer_to_a_request_has_one_last_piece(pooled: tuple[Base, Pool]) -> None:
    scheduler = runner_of(pooled, max_batch_size=4).scheduler()
    refused = Request("say red", SHORT, (Route(("gone",), (1.0,)),), n=3)
    cancelled, too_many = Request("say red", SHORT, n=2), Request("say red", SHORT, n=5)
    cancelled.cancel()
    for request in (refused, cancelled, too_many, Request("say red", SHORT, n=4)):
        scheduler.add(request)
    ends = finished(scheduler)  # which counts none twice
    assert sorted(ends) == [
        (number, choice) for number, count in enumerate((3, 2, 5, 4)) for choice in range(count)
    ]
