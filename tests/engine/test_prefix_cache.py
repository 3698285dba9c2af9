"""Keys and values kept between requests: what is read, what is the same, what goes first."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.families import convert, write_family
from dlplora.adapters import read_adapter
from dlplora.engine.cache import KeyValues
from dlplora.engine.prefix_cache import PrefixCache
from dlplora.engine.requests import Message, Request
from dlplora.engine.runner import Runner
from dlplora.errors import GenerationError
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.models import Base, load_base
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.sampling import Sampling
from tests.device import float32_place
from tests.engine.requests_of import BOTH, ONE, ByLength, alone, forwards, pooled_base
from tests.tiny import tiny_base

LONG = "what is the colour opposite of sum word say a b c d e f g red green blue grey"
SAMPLING = Sampling(max_new_tokens=6, ignore_eos=True)


@pytest.fixture
def pooled(tmp_path: Path) -> Iterator[tuple[Base, Pool]]:
    base, pool, _ = pooled_base(tmp_path)
    yield base, pool
    pool.layers.unwrap()


def runner_of(pooled: tuple[Base, Pool], **more: Any) -> Runner:
    return Runner(*pooled, **({"router": ByLength()} | more))


def second_turn(first: Request, answer: str, question: str) -> Request:
    turns = Message("user", str(first.prompt)), Message("assistant", answer)
    return Request((*turns, Message("user", question)), SAMPLING, first.routes)


def test_the_second_turn_of_a_chat_reads_only_its_own_tokens(pooled: tuple[Base, Pool]) -> None:
    base = pooled[0]
    runner = runner_of(pooled)
    first = Request(LONG, SAMPLING, (BOTH,))
    (answer,) = runner.generate([first])
    second = second_turn(first, answer.text, "say red")
    read = forwards(base)
    (found,) = runner.generate([second])
    known = answer.num_prompt_tokens + answer.num_tokens - 1  # the last was never read
    assert found.num_cached_tokens == known
    assert read[0] == (1, found.num_prompt_tokens - known)
    assert [found] == alone(runner, second)


def test_prompts_of_different_known_lengths_are_read_together(pooled: tuple[Base, Pool]) -> None:
    base = pooled[0]
    runner = runner_of(pooled)
    firsts = [
        Request(f"{LONG} {end}", SAMPLING, (route,))
        for end, route in (("up", ONE), ("down left hot cold", BOTH))
    ]
    answers = runner.generate(firsts)
    seconds = [
        second_turn(first, answer.text, question)
        for first, answer, question in zip(firsts, answers, ("say red", "up ?"), strict=True)
    ]
    seconds.append(Request("say a b c", SAMPLING, (ONE,)))
    read = forwards(base)
    found = runner.generate(seconds)
    assert read[0][0] == 3
    assert [answer.num_cached_tokens > 0 for answer in found] == [True, True, False]
    assert found == [alone(runner, request)[0] for request in seconds]


def test_another_mix_knows_nothing_of_a_prompt(pooled: tuple[Base, Pool]) -> None:
    runner = runner_of(pooled)
    for route in (ONE, BOTH, Route(("one",), (0.5,))):
        request = Request(LONG, SAMPLING, (route,))
        assert runner.generate([request])[0].num_cached_tokens == 0
        assert runner.generate([request])[0].num_cached_tokens > 0
        assert runner.generate([request]) == alone(runner, request)


def test_an_adapter_that_was_replaced_knows_nothing_of_a_prompt(
    pooled: tuple[Base, Pool], tmp_path: Path
) -> None:
    runner, pool = runner_of(pooled), pooled[1]
    request = Request(LONG, SAMPLING, (ONE,))
    (before,) = runner.generate([request])
    two = read_adapter(tmp_path / "two", base_fingerprint="f" * 64)
    pool.remove("one")
    pool.add(replace(two, name="one"))
    (after,) = runner.generate([request])
    assert after.num_cached_tokens == 0
    assert [after] == alone(runner, request)
    assert after.text != before.text


@pytest.mark.parametrize("policy", ["keep", "refill"])
def test_what_was_written_by_several_mixes_is_not_taken_for_one(
    pooled: tuple[Base, Pool], policy: str
) -> None:
    runner = runner_of(pooled)
    sampling = Sampling(max_new_tokens=12, temperature=3.0)
    for seed in range(20):
        told = Request(
            f"{LONG} .", Sampling(12, 3.0, seed=seed), (ONE, BOTH), policy, num_answers=2
        )  # type: ignore[arg-type]
        (first,) = runner.generate([told])
        again = Request(f"{LONG} .", sampling, (ONE,))
        assert runner.generate([again]) == alone(runner, again)
        second = second_turn(Request(f"{LONG} .", sampling, (BOTH,)), first.text, "say red")
        assert runner.generate([second]) == alone(runner, second)


def test_a_model_whose_cache_is_of_another_kind_goes_without() -> None:
    for kind in ("sliding", "lfm2"):
        base = tiny_base(kind)
        runner = Runner(base, Pool(FusedLayers(base.model)))
        request = Request(LONG, SAMPLING, (BASE_ROUTE,))
        first, second = runner.generate([request]), runner.generate([request])
        assert first == second
        assert second[0].num_cached_tokens == 0


def entry(num_tokens: int) -> KeyValues:
    """Keys and values of 1 kiB a token."""
    return ((torch.zeros(1, num_tokens, 128), torch.zeros(1, num_tokens, 128)),)


def test_what_was_used_least_recently_goes_first() -> None:
    cache = PrefixCache(100 / 1024)
    ids = {name: [number, *range(100, 139)] for number, name in enumerate("abc")}
    cache.store((), ids["a"], entry(40))
    cache.store((), ids["b"], entry(40))
    assert cache.find((), [*ids["a"], 7]) is not None
    cache.store((), ids["c"], entry(40))
    known = {name: cache.find((), [*ids[name], 7]) is not None for name in "abc"}
    assert known == {"a": True, "b": False, "c": True}
    cache.store((), list(range(200)), entry(200))  # more than may be kept
    assert cache.num_bytes == 80 * 1024
    cache.store((), [*ids["a"], 5, 6], entry(42))  # what it begins with goes
    assert cache.num_bytes == 82 * 1024


@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), max_size=8),
    asked=st.lists(st.integers(0, 2), min_size=1, max_size=60),
)
def test_the_longest_known_beginning_is_found(prompts: list[list[int]], asked: list[int]) -> None:
    cache = PrefixCache(1000)
    for ids in prompts:
        cache.store((), ids, entry(len(ids)))
    longest = 0
    for ids in prompts:
        shared = next(
            (n for n, (a, b) in enumerate(zip(ids, asked, strict=False)) if a != b),
            min(len(ids), len(asked)),
        )
        longest = max(longest, min(shared, len(asked) - 1))
    found = cache.find((), asked)
    assert (0 if found is None else found[0][0].shape[1]) == (longest if longest >= 16 else 0)


def test_no_size_is_refused() -> None:
    for size in (-1, float("nan"), float("inf")):
        with pytest.raises(GenerationError, match=f"cache_mib is {size}, expected 0 or more"):
            PrefixCache(size)


def test_adapters_that_are_gone_are_not_kept(pooled: tuple[Base, Pool], tmp_path: Path) -> None:
    runner, pool = runner_of(pooled), pooled[1]
    two = read_adapter(tmp_path / "two", base_fingerprint="f" * 64)
    living = []
    for number in range(4):
        pool.add(replace(two, name=f"guest{number}"))
        route = Route((f"guest{number}",), (1.0,))
        living.append(weakref.ref(pool.row(route)[0][0]))  # type: ignore[index]
        runner.generate([Request(LONG, SAMPLING, (route,))])
        pool.remove(f"guest{number}")
    gc.collect()
    assert [one() for one in living] == [None] * 4


@pytest.mark.parametrize("name", ["gpt_neo", "mpt"])
def test_a_model_that_goes_by_places_answers_the_same_again(name: str, tmp_path: Path) -> None:
    write_family(name, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "base", float32_place())
    base = load_base(tmp_path / "base", place=float32_place())
    runner = Runner(base, Pool(FusedLayers(base.model)), prefill_tokens=7)
    for text in (LONG, f"{LONG} up down", f"{LONG} up down left"):
        request = Request(text, SAMPLING, (BASE_ROUTE,))
        assert runner.generate([request]) == alone(runner, request)
