"""Probes of the base model: what they see, what is read twice, and what stays between requests."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlplora.adapters import LoraAdapter
from dlplora.engine.answers import raising
from dlplora.engine.reading import prefill, probe
from dlplora.engine.requests import Request
from dlplora.engine.routing import RequestRouter
from dlplora.engine.runner import Runner
from dlplora.errors import RouterError
from dlplora.lora.attach import Pool, attached
from dlplora.models import Base
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.routing.logo import Logo, projection_path
from dlplora.sampling import Sampling
from dlplora.words import Policy
from tests.device import on_device
from tests.engine.limits import limited
from tests.peft_adapters import peft_pool
from tests.tiny import ALL_TARGETS, tiny_base

KINDS = list(ALL_TARGETS)
QUESTIONS = ["what is up ?", "which colour : two a b c d ?", "say red", "sum of one plus two : a ?"]
ONE, BOTH = Route(("one",), (1.0,)), Route(("two", "one"), (0.75, 0.25))
SAMPLING = Sampling(max_new_tokens=9)


@dataclass
class Told:
    """A probe that gives prompts the routes it was told, whatever it is shown."""

    path: str
    told: Sequence[Route]

    def routes(self, inputs_BI: Tensor) -> list[Route]:
        return list(self.told[: len(inputs_BI)])


def configs(kind: str) -> dict[str, dict[str, object]]:
    common = {"target_modules": ALL_TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
    return {"one": {"r": 2} | common, "two": {"r": 4, "lora_alpha": 3} | common}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pooled(kind: str, tmp_path: Path) -> Iterator[tuple[Base, Pool, list[LoraAdapter], str]]:
    base = tiny_base(kind)
    adapters = peft_pool(base.model, configs(kind), tmp_path)[1]
    with attached(base.model, adapters) as pool:
        path = projection_path(base.model, projection=ALL_TARGETS[kind][0], block="last")
        yield base, pool, adapters, path


def prompts_of(base: Base, questions: Sequence[str] = QUESTIONS) -> list[tuple[int, ...]]:
    return [base.chat.prompt(question) for question in questions]


def forwards(base: Base) -> list[int]:
    """Return a list that gets the number of tokens of each forward pass, padding included."""
    read: list[int] = []
    embed = base.model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    return read


def test_scores_are_the_norms_of_what_peft_s_own_layers_add(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    models, adapters = peft_pool(base.model, configs(kind), tmp_path)
    path = projection_path(base.model, projection=ALL_TARGETS[kind][0], block="last")
    logo = Logo.over(adapters, path, score="norm", k=2)
    with attached(base.model, adapters) as pool:
        inputs_BI = probe(base, pool, prompts_of(base), path)[1]
    scores_BN = logo.scores(inputs_BI)
    for prompt, scores_N in zip(prompts_of(base), scores_BN, strict=True):
        seen: list[Tensor] = []
        hook = base.model.get_submodule(path).register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0])
        )
        base.model(on_device([prompt]))  # the base model alone, one prompt, no padding
        hook.remove()
        for name, score in zip(logo.labels, scores_N.tolist(), strict=True):
            layer = models[name].base_model.model.get_submodule(path)
            lora_a, lora_b = layer.lora_A["default"], layer.lora_B["default"]
            added = layer.scaling["default"] * lora_b(lora_a(seen[0][0, -1]))
            assert score == pytest.approx(added.norm().item(), rel=1e-4)


@pytest.mark.parametrize("pass_tokens", [1, 256])
def test_what_is_seen_of_a_padded_prompt_is_what_is_seen_of_it_alone(
    pooled: tuple[Base, Pool, list[LoraAdapter], str],
    pass_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited(monkeypatch, pass_tokens=pass_tokens)
    base, pool, _, path = pooled
    prompts = prompts_of(base, [*QUESTIONS, "what is up ? what is up ? what is up ?", "what is"])
    together = probe(base, pool, prompts, path)[1]
    alone = [probe(base, pool, [prompt], path)[1][0] for prompt in prompts]
    backward = probe(base, pool, prompts[::-1], path)[1].flip(0)
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together, backward, atol=1e-4, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_a_probe_reads_as_the_base_model_whatever_ran_before(
    pooled: tuple[Base, Pool, list[LoraAdapter], str],
) -> None:
    base, pool, _, path = pooled
    prompts = prompts_of(base)
    batch, fresh = probe(base, pool, prompts, path)
    assert batch.rows == ((),) * len(prompts)
    for prompt, logits in zip(prompts, batch.logits_BV, strict=True):
        expected = base.model(on_device([prompt])).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    adapted = prefill(base, pool, prompts, [BOTH] * len(prompts))
    adapted.step([5, 6, 7, 8])
    torch.testing.assert_close(probe(base, pool, prompts, path)[1], fresh, atol=0, rtol=0)


def test_where_the_base_model_answers_its_own_reading_is_gone_on_from(
    pooled: tuple[Base, Pool, list[LoraAdapter], str],
) -> None:
    base, pool, _, path = pooled
    requests = [Request(question, SAMPLING) for question in QUESTIONS]
    runner = Runner(base, pool)
    prompts = [base.chat.prompt(question) for question in QUESTIONS]
    routed = [replace(request, routes=(BASE_ROUTE,)) for request in requests]
    anew = runner.finish(runner.begin(routed, prompts))
    read = forwards(base)
    runner.begin(routed, prompts)
    once = list(read)
    read.clear()
    probing = Runner(base, pool, router=Told(path, [BASE_ROUTE] * 4))
    running = probing.begin(requests, prompts)
    assert read == once
    read.clear()
    answers = probing.finish(running)
    assert [answer.text for answer in answers] == [answer.text for answer in anew]
    read.clear()
    asked = probing.generate(requests)
    assert [answer.text for answer in asked] == [answer.text for answer in anew]
    assert read[: len(once)] == once
    assert all(tokens <= len(QUESTIONS) for tokens in read[len(once) :])  # one each from then on


def test_only_what_adapters_answer_is_read_again(
    kind: str, pooled: tuple[Base, Pool, list[LoraAdapter], str]
) -> None:
    base, pool, _, path = pooled
    told = [ONE, BASE_ROUTE, BOTH, BASE_ROUTE]
    requests = [Request(question, SAMPLING) for question in QUESTIONS]
    runner = Runner(base, pool)
    prompts = [base.chat.prompt(question) for question in QUESTIONS]
    routed = [replace(one, routes=(route,)) for one, route in zip(requests, told, strict=True)]
    anew = runner.finish(runner.begin(routed, prompts))
    read = forwards(base)
    running = Runner(base, pool, router=Told(path, told)).begin(requests, prompts)
    sizes = [len(prompt) for prompt in prompts]
    again = 4 * max(sizes) if kind == "sliding" else 2 * max(sizes[0], sizes[2])
    apart = [*sizes, sizes[0], sizes[2]]
    assert read == (apart if kind == "lfm2" else [4 * max(sizes), again])
    assert [sequence.route for sequence in running.sequences] == told
    answers = runner.finish(running)
    assert answers == anew
    assert Runner(base, pool, router=Told(path, told)).generate(requests) == anew
    assert len({answer.text for answer in answers}) > 1


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[tuple[Base, Pool, Logo]]:
    base = tiny_base()
    adapters = peft_pool(base.model, configs("llama"), tmp_path)[1]
    path = projection_path(base.model, projection="q_proj", block="last")
    with attached(base.model, adapters) as pool:
        yield base, pool, Logo.over(adapters, path, score="norm", k=20)


def test_an_unsure_probe_falls_back_to_what_the_base_model_has_read(
    llama: tuple[Base, Pool, Logo],
) -> None:
    base, pool, logo = llama
    shares = [route.confidence or 0.0 for route in Runner(base, pool, router=logo).route(QUESTIONS)]
    limit = sorted(shares)[2]
    runner = Runner(base, pool, router=logo, fallback_below=limit)
    routes = runner.route(QUESTIONS)
    assert [bool(route.adapters) for route in routes] == [share >= limit for share in shares]
    read = forwards(base)
    answers = runner.generate([Request(question, SAMPLING) for question in QUESTIONS])
    prompts = prompts_of(base)
    own = [len(prompt) for prompt, share in zip(prompts, shares, strict=True) if share >= limit]
    assert [tokens for tokens in read if tokens > 4] == [
        4 * max(map(len, prompts)),
        len(own) * max(own),
    ]
    by_told = [Request(q, SAMPLING, (r,)) for q, r in zip(QUESTIONS, routes, strict=True)]
    assert [a.text for a in answers] == [a.text for a in runner.generate(by_told)]


def test_a_probe_routes_requests_beside_those_that_bring_their_routes(
    llama: tuple[Base, Pool, Logo],
) -> None:
    base, pool, logo = llama
    runner = Runner(base, pool, router=logo, max_batch_size=3)
    chosen = runner.route(QUESTIONS)
    requests = [
        Request(question, SAMPLING, (ONE,) if number % 2 else ())
        for number, question in enumerate(QUESTIONS)
    ]
    answers = runner.generate(requests)
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        route = ONE if number % 2 else chosen[number]
        assert answer.parts[0].route.adapters == route.adapters
        alone = Request(question, SAMPLING, (answer.parts[0].route,))
        assert answer.text == runner.generate([alone])[0].text
    options = ["red", "green blue"]
    by_route = runner.score(QUESTIONS[1], options, route=chosen[1])
    assert runner.score(QUESTIONS[1], options).logprobs == pytest.approx(by_route.logprobs)


def test_probes_of_several_systems_route_their_own_requests(
    llama: tuple[Base, Pool, Logo],
) -> None:
    base, pool, logo = llama
    other = RequestRouter(base, pool, Told(logo.path, [BOTH] * 4))
    runner = Runner(base, pool, router=Told(logo.path, [ONE] * 4), systems={"other": other})
    requests = [Request("say red", SAMPLING, system=name) for name in (None, "other")]
    answers = runner.generate(requests)
    assert [answer.parts[0].route for answer in answers] == [ONE, BOTH]
    told = [replace(requests[0], routes=(route,)) for route in (ONE, BOTH)]
    assert [a.text for a in answers] == [a.text for a in runner.generate(told)]


@pytest.mark.parametrize("policy", ["keep", "refill"])
def test_a_probe_that_is_asked_again_reads_in_parts_while_others_are_answered(
    llama: tuple[Base, Pool, Logo], policy: Policy
) -> None:
    base, pool, logo = llama

    class Turning(Told):
        def routes(self, inputs_BI: Tensor) -> list[Route]:
            seen.append(len(inputs_BI))
            return [BOTH if len(seen) % 2 else ONE] * len(inputs_BI)

    seen: list[int] = []
    text = " ".join(["what is up ?"] * 12)
    request = Request(text, Sampling(max_new_tokens=40), policy=policy, num_answers=3)
    expected = Runner(base, pool, router=Turning(logo.path, [])).generate([request])
    assert len(seen) > 1
    seen.clear()
    runner = Runner(base, pool, router=Turning(logo.path, []), prefill_tokens=16, cache_mib=0)
    read = forwards(base)
    assert runner.generate([request]) == expected
    assert max(read) <= 16


@pytest.mark.parametrize("route", [ONE, BASE_ROUTE])
def test_a_probed_prompt_is_scored_by_the_route_it_gets(
    llama: tuple[Base, Pool, Logo], route: Route
) -> None:
    base, pool, logo = llama
    runner = Runner(base, pool, router=Told(logo.path, [route]))
    (answer,) = runner.generate([Request("say red", SAMPLING, logprobs=0, echo=True)])
    ids = [score.token for score in (*answer.prompt_tokens, *answer.tokens)]
    with torch.no_grad(), pool.mixing(pool.mix([route])):
        logprobs = base.model(on_device([ids])).logits[0].log_softmax(-1)
    expected = logprobs[range(len(ids) - 1), ids[1:]].tolist()
    found = [score.logprob for score in (*answer.prompt_tokens, *answer.tokens)]
    assert found[1:] == pytest.approx(expected, abs=1e-3)


def test_the_next_answer_is_probed_with_all_that_was_written(
    llama: tuple[Base, Pool, Logo],
) -> None:
    base, pool, logo = llama
    seen: list[Tensor] = []

    class Listening(Told):
        def routes(self, inputs_BI: Tensor) -> list[Route]:
            seen.append(inputs_BI)
            return [BOTH if len(seen) % 2 else ONE] * len(inputs_BI)

    runner = Runner(base, pool, router=Listening(logo.path, []))
    request = Request("say red", Sampling(max_new_tokens=40), policy="keep", num_answers=2)
    (answer,) = runner.generate([request])
    assert [part.route.mix for part in answer.parts] == [BOTH.mix, ONE.mix]
    ids = base.chat.prompt("say red")
    ids += (*base.chat.answer(answer.parts[0].text), base.chat.end_id)
    torch.testing.assert_close(seen[1], probe(base, pool, [ids], logo.path)[1])
    assert not torch.allclose(seen[0], seen[1])


def test_an_adapter_that_left_ends_those_requests_alone_that_are_routed_to_it(
    llama: tuple[Base, Pool, Logo],
) -> None:
    base, pool, logo = llama
    pool.remove("two")
    runner = Runner(base, pool, router=Told(logo.path, [ONE, BOTH, BASE_ROUTE]))
    requests = [Request(question, SAMPLING) for question in QUESTIONS[:3]]
    last = {piece.number: piece for piece in runner.run(requests)}
    assert isinstance(last[1].error, RouterError)
    assert "no adapter 'two'" in str(last[1].error)
    for number, route in ((0, ONE), (2, BASE_ROUTE)):
        answer = last[number].answer
        assert answer is not None
        told = Request(QUESTIONS[number], SAMPLING, (route,))
        assert answer.text == runner.generate([told])[0].text
    gone = Runner(base, pool, router=Told(logo.path, [BOTH]))
    with pytest.raises(RouterError, match="no adapter 'two'"):
        list(raising(gone.run(requests[:1])))


def test_a_layer_that_no_adapter_changes_cannot_be_probed(llama: tuple[Base, Pool, Logo]) -> None:
    base, pool, _ = llama
    path = "model.layers.1.mlp.down_proj"
    with pytest.raises(RouterError, match=rf"{path}: no adapter changes this layer"):
        probe(base, pool, prompts_of(base), path)
    pieces = list(Runner(base, pool, router=Told(path, [ONE])).run([Request("say red", SAMPLING)]))
    assert [type(piece.error) for piece in pieces] == [RouterError]


def test_threads_never_see_each_other_s_prompts(llama: tuple[Base, Pool, Logo]) -> None:
    base, pool, logo = llama
    runner = Runner(base, pool, router=logo)
    expected = [runner.route([question]) for question in QUESTIONS]
    wrong: list[str] = []

    def ask(number: int) -> None:
        for _ in range(15):
            (found,) = runner.route([QUESTIONS[number]])
            (own,) = expected[number]
            if found.weights != pytest.approx(own.weights, abs=1e-5):
                wrong.append(f"{QUESTIONS[number]}: {found}")
            prefill(base, pool, [base.chat.prompt(QUESTIONS[number])], [BOTH])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(QUESTIONS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len({route.weights for (route,) in expected}) == len(QUESTIONS)
