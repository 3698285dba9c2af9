"""Answers of the engine against transformers' own generation and plain forward passes."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dlplora.adapters import LoraAdapter
from dlplora.engine import Engine
from dlplora.models import Base
from dlplora.records.routes import BASE_ROUTE, Route
from tests.peft_adapters import peft_pool
from tests.tiny import FAN_IN_FAN_OUT, TARGETS, tiny_base

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
KINDS = list(TARGETS)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pool_of(base: Base, kind: str, folder: Path) -> list[LoraAdapter]:
    transposed = FAN_IN_FAN_OUT[kind]
    configs = {
        "one": {"r": 2, "target_modules": TARGETS[kind], "fan_in_fan_out": transposed},
        "two": {"r": 4, "target_modules": TARGETS[kind][:1], "fan_in_fan_out": transposed},
    }
    return peft_pool(base.model, configs, folder)[1]


def prompts_of(base: Base, questions: Sequence[str] = QUESTIONS) -> list[tuple[int, ...]]:
    return [base.chat.prompt(question, max_tokens=99).ids for question in questions]


def test_a_batch_answers_as_each_prompt_alone(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    with Engine.over(base, pool_of(base, kind, tmp_path)) as engine:
        prompts = prompts_of(base)
        together = engine.generate(engine.ask(prompts, ROUTES), max_new_tokens=12)
        alone = [
            engine.generate(engine.ask([prompt], [route]), max_new_tokens=12)[0]
            for prompt, route in zip(prompts, ROUTES, strict=True)
        ]
    assert together == alone
    assert len(set(together)) > 1


def test_greedy_answers_are_those_of_transformers_with_peft(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    config = {"r": 3, "target_modules": TARGETS[kind], "fan_in_fan_out": FAN_IN_FAN_OUT[kind]}
    models, adapters = peft_pool(base.model, {"one": config}, tmp_path)
    prompts = prompts_of(base)
    with Engine.over(base, adapters) as engine:
        asked = engine.ask(prompts, [Route(("one",), (1.0,))] * len(prompts))
        found = engine.generate(asked, max_new_tokens=10)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        output = models["one"].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=base.chat.end_id,
            pad_token_id=base.chat.pad_id,
        )
        assert text == base.chat.text(output[0, len(prompt) :].tolist())


def test_options_score_as_one_plain_forward_each(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    with Engine.over(base, pool_of(base, kind, tmp_path)) as engine:
        asked = engine.ask(prompts_of(base), ROUTES)
        found = engine.score_options(asked, OPTIONS)
        for place, prompt in enumerate(prompts_of(base)):
            for option, logprob in zip(OPTIONS[place], found[place].logprobs, strict=True):
                answer = base.chat.answer(option)
                with engine.pool.mixing(engine.pool.weights([ROUTES[place]])):
                    logits = base.model(torch.tensor([[*prompt, *answer]])).logits[0]
                rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
                expected = sum(row[token].item() for row, token in zip(rows, answer, strict=True))
                assert logprob == pytest.approx(expected, abs=1e-4)
    assert [scores.tokens for scores in found] == [(1, 2, 3), (1, 1), (4,), (1, 2)]


def test_scoring_leaves_the_cache_as_it_was(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    with Engine.over(base, pool_of(base, kind, tmp_path)) as engine:
        asked = engine.ask(prompts_of(base), ROUTES)
        before = engine.generate(asked, max_new_tokens=6)
        scores = engine.score_options(asked, OPTIONS)
        assert engine.generate(asked, max_new_tokens=6) == before
        assert engine.score_options(asked, OPTIONS) == scores


def test_generation_stops_at_the_limit_and_at_the_end_token() -> None:
    base = tiny_base()
    base.model.config.eos_token_id = None
    with Engine.over(base, []) as engine:
        asked = engine.ask(prompts_of(base), [BASE_ROUTE] * 4)
        full = engine.generate(asked, max_new_tokens=8)
        assert all(len(text.split()) <= 8 for text in full)
        longest = max(full, key=lambda text: len(text.split()))
        third = base.chat.answer(longest.split()[2])[0]
        base.model.generation_config.eos_token_id = [third]
        short = engine.generate(asked, max_new_tokens=8)[full.index(longest)]
    first = longest.split().index(longest.split()[2])
    assert short.split() == longest.split()[:first]


def test_an_engine_without_adapters_is_the_base_model() -> None:
    base = tiny_base()
    prompts = prompts_of(base)
    with Engine.over(base, []) as engine:
        asked = engine.ask(prompts, [BASE_ROUTE] * len(prompts))
    for prompt, row in zip(prompts, asked.logits_BV, strict=True):
        expected = base.model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
