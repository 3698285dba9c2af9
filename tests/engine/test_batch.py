"""Batches against transformers' own generation and plain forward passes, alone and joined."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache

from dlplora.adapters import LoraAdapter
from dlplora.engine.batch import Batch
from dlplora.engine.grouping import least_effort
from dlplora.engine.option_scoring import score_options
from dlplora.engine.reading import prefill
from dlplora.lora.attach import attached
from dlplora.models import Base
from dlplora.records.routes import BASE_ROUTE, Route
from tests.device import on_device
from tests.engine.limits import limited
from tests.peft_adapters import peft_pool
from tests.tiny import ALL_TARGETS, tiny_base

QUESTIONS = ["what is up ?", "which colour : two a b c d ?", "say red", "sum of one plus two : a ?"]
OPTIONS = [
    ["red", "green blue", "up down left"],
    ["yes", "no"],
    ["red one two three"],
    ["a", "b c"],
]
ROUTES = [
    Route(("one",), (1.0,)),
    Route(("one", "two"), (0.4, 0.6)),
    BASE_ROUTE,
    Route(("two",), (1.0,)),
]
KINDS = list(ALL_TARGETS)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pool_of(base: Base, kind: str, folder: Path) -> list[LoraAdapter]:
    transposed = kind == "gpt2"
    configs = {
        "one": {"r": 2, "target_modules": ALL_TARGETS[kind], "fan_in_fan_out": transposed},
        "two": {"r": 4, "target_modules": ALL_TARGETS[kind][:1], "fan_in_fan_out": transposed},
    }
    return peft_pool(base.model, configs, folder)[1]


def prompts_of(base: Base, questions: Sequence[str] = QUESTIONS) -> list[tuple[int, ...]]:
    return [base.chat.prompt(question) for question in questions]


def greedy(batch: Batch, count: int) -> list[list[int]]:
    """Write `count` likeliest tokens in a fork of a batch."""
    batch = batch.fork()
    found: list[list[int]] = [[] for _ in range(len(batch))]
    for _ in range(count):
        tokens = batch.logits_BV.argmax(-1).tolist()
        for row, token in zip(found, tokens, strict=True):
            row.append(token)
        batch.step(tokens)
    return found


def same(batch: Batch, row: int, other: Batch, other_row: int = 0) -> None:
    torch.testing.assert_close(
        batch.logits_BV[row], other.logits_BV[other_row], atol=1e-4, rtol=1e-4
    )


def test_a_batch_goes_on_as_each_sequence_alone(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    with attached(base.model, pool_of(base, kind, tmp_path)) as pool:
        prompts = prompts_of(base)
        together = prefill(base, pool, prompts, ROUTES)
        alone = [
            prefill(base, pool, [prompt], [route])
            for prompt, route in zip(prompts, ROUTES, strict=True)
        ]
        assert greedy(together, 12) == [greedy(batch, 12)[0] for batch in alone]
        assert len({tuple(row) for row in greedy(together, 12)}) > 1


def test_what_is_read_in_parts_and_by_shared_prefixes_is_what_each_reads_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, pass_tokens=1)
    base = tiny_base(kind)
    questions = ["what is up ?", "what is up", "what is up one two three ?", "say red", "what is"]
    routes = [ROUTES[0], ROUTES[1], ROUTES[0], ROUTES[1], ROUTES[0]]
    with attached(base.model, pool_of(base, kind, tmp_path)) as pool:
        prompts = prompts_of(base, questions)
        together = prefill(base, pool, prompts, routes)
        alone = [
            prefill(base, pool, [prompt], [route])
            for prompt, route in zip(prompts, routes, strict=True)
        ]
        for row, batch in enumerate(alone):
            same(together, row, batch)
        assert greedy(together, 8) == [greedy(batch, 8)[0] for batch in alone]
        scores = score_options(together, [["red", "one two"]] * 5)
        for found, batch in zip(scores, alone, strict=True):
            (expected,) = score_options(batch, [["red", "one two"]])
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_a_prefix_is_read_once_for_each_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("llama")
    read: list[tuple[int, ...]] = []
    embed = base.model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape)))
    prompts = [(*range(5, 25), number) for number in range(8)]
    limited(monkeypatch, pass_tokens=20)
    with attached(base.model, pool_of(base, "llama", tmp_path)) as pool:
        read.clear()
        prefill(base, pool, prompts, [ROUTES[0], ROUTES[1]] * 4)
        assert read == [(2, 20), (8, 1)]
        read.clear()
        prefill(base, pool, prompts[:1], ROUTES[:1])
        assert read == [(1, 21)]


@given(lengths=st.lists(st.integers(1, 900), min_size=1, max_size=7))
def test_prompts_are_cut_into_the_parts_of_least_effort(lengths: list[int]) -> None:
    def effort(parts: Sequence[Sequence[int]]) -> int:
        return sum(max(lengths[row] for row in part) * len(part) + 256 for part in parts)

    found = least_effort(lengths, 256)
    assert sorted(row for part in found for row in part) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    every = [
        [order[a:b] for a, b in pairwise([0, *cuts, len(order)])]
        for count in range(len(order))
        for cuts in combinations(range(1, len(order)), count)
    ]
    assert effort(found) == min(map(effort, every))


def test_greedy_tokens_are_those_of_transformers_with_peft(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    config = {"r": 3, "target_modules": ALL_TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
    models, adapters = peft_pool(base.model, {"one": config}, tmp_path)
    prompts = prompts_of(base)
    with attached(base.model, adapters) as pool:
        batch = prefill(base, pool, prompts, [Route(("one",), (1.0,))] * len(prompts))
        found = greedy(batch, 10)
    for prompt, row in zip(prompts, found, strict=True):
        ids = on_device([prompt])
        output = models["one"].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=base.chat.pad_id,
        )
        assert row == output[0, len(prompt) :].tolist()


def test_rows_leave_and_join_without_a_difference_to_the_others(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    with attached(base.model, pool_of(base, kind, tmp_path)) as pool:
        prompts = prompts_of(base)
        batch = prefill(base, pool, prompts[:3], ROUTES[:3])
        late = prefill(base, pool, prompts[3:], ROUTES[3:])
        alone = [
            prefill(base, pool, [prompt], [route])
            for prompt, route in zip(prompts, ROUTES, strict=True)
        ]

        def step(*rows: int) -> None:
            tokens = [5 + row for row in rows]
            batch.step(tokens)
            for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                alone[row].step([token])
                same(batch, place, alone[row])

        step(0, 1, 2)
        batch.keep([0, 2])
        step(0, 2)
        assert batch.can_join(late) == (kind != "sliding")
        if kind == "sliding":
            return
        batch.join(late)
        step(0, 2, 3)
        batch.keep([2, 0])
        step(3, 0)
        batch.keep([0])
        step(3)


def test_a_fork_continues_without_the_first(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    with attached(base.model, pool_of(base, kind, tmp_path)) as pool:
        batch = prefill(base, pool, prompts_of(base), ROUTES)
        before = greedy(batch, 6)
        scores = score_options(batch, OPTIONS)
        fork = batch.fork()
        fork.step([5, 6, 7, 8])
        fork.keep([1])
        assert greedy(batch, 6) == before
        assert score_options(batch, OPTIONS) == scores


def test_a_sequence_goes_on_by_another_route(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    first, second = Route(("one",), (1.0,)), Route(("two", "one"), (0.5, 0.5))
    with attached(base.model, pool_of(base, kind, tmp_path)) as pool:
        prompts = prompts_of(base)[:2]
        batch = prefill(base, pool, prompts, [first, first])
        cache = DynamicCache(config=base.model.config)
        ids = on_device([prompts[1]])
        with pool.mixing(pool.mix([first])):
            base.model(ids, past_key_values=cache, use_cache=True)
        batch.step([5, 6])
        with pool.mixing(pool.mix([first])):
            base.model(on_device([[6]]), past_key_values=cache, use_cache=True)
        batch.reroute([batch.rows[0], pool.row(second)])
        batch.step([7, 8])
        with pool.mixing(pool.mix([second])):
            expected = base.model(on_device([[8]]), past_key_values=cache, use_cache=True)
        torch.testing.assert_close(batch.logits_BV[1], expected.logits[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part_tokens", [1, 3, 7, 1024])
def test_options_score_as_one_plain_forward_each(
    kind: str, part_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, option_tokens=part_tokens)
    base = tiny_base(kind)
    read: list[tuple[int, ...]] = []
    embed = base.model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, inputs: read.append(tuple(inputs[0].shape)))
    with attached(base.model, pool_of(base, kind, tmp_path)) as pool:
        batch = prefill(base, pool, prompts_of(base), ROUTES)
        read.clear()
        found = score_options(batch, OPTIONS)
        longest = 3  # the rest of the longest option
        assert all(rows * width <= max(part_tokens, longest) for rows, width in read)
        for place, prompt in enumerate(prompts_of(base)):
            for option, logprob in zip(OPTIONS[place], found[place].logprobs, strict=True):
                answer = base.chat.answer(option)
                with pool.mixing(pool.mix([ROUTES[place]])):
                    logits = base.model(on_device([[*prompt, *answer]])).logits[0]
                rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
                expected = sum(row[token].item() for row, token in zip(rows, answer, strict=True))
                assert logprob == pytest.approx(expected, abs=1e-4)
    assert [scores.tokens for scores in found] == [(1, 2, 3), (1, 1), (4,), (1, 2)]


def test_a_batch_without_adapters_is_the_base_model() -> None:
    base = tiny_base()
    prompts = prompts_of(base)
    with attached(base.model, []) as pool:
        batch = prefill(base, pool, prompts, [BASE_ROUTE] * len(prompts))
    for prompt, row in zip(prompts, batch.logits_BV, strict=True):
        expected = base.model(on_device([prompt])).logits[0, -1]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_sequences_end_with_the_adapters_that_they_began_with(tmp_path: Path) -> None:
    base = tiny_base()
    one, two = pool_of(base, "llama", tmp_path)
    other = replace(two, name="one")  # other weights by the same name
    with attached(base.model, [one, two]) as pool:
        prompts = prompts_of(base)[:3]
        routes = [Route(("one",), (1.0,)), Route(("two",), (1.0,)), Route(("one",), (1.0,))]
        alone = prefill(base, pool, [prompts[0]], [routes[0]])
        batch = prefill(base, pool, prompts[:2], routes[:2])
        scores = score_options(alone, OPTIONS[:1])
        pool.remove("one")
        pool.remove("two")
        pool.add(other)
        batch.keep([0])
        batch.step([5])
        alone.step([5])
        same(batch, 0, alone)
        late = prefill(base, pool, [prompts[2]], [routes[2]])
        batch.join(late)
        for tokens in ([6, 7], [8, 9]):
            batch.step(tokens)
            alone.step(tokens[:1])
            late.step(tokens[1:])
            same(batch, 0, alone)
            same(batch, 1, late)
    with attached(base.model, [one]) as pool:
        again = score_options(prefill(base, pool, [prompts[0]], [routes[0]]), OPTIONS[:1])
    assert again[0].logprobs == pytest.approx(scores[0].logprobs)
