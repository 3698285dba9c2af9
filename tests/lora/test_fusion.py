"""Fused matrices against plain averages, and against the model's own forward."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlplora.adapters import LoraAdapter
from dlplora.engine.answers import Answer
from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.errors import AdapterError, RouterError
from dlplora.lora.attach import Pool, attached
from dlplora.lora.fusion import FusionPool, fuse
from dlplora.lora.stacks import Resident
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.sampling import Sampling
from dlplora.words import Policy
from tests.device import on_device
from tests.peft_adapters import peft_pool
from tests.tiny import TARGETS, tiny_base, tiny_model

IDS = on_device([[5, 6, 7, 8], [9, 10, 11, 12]])
PLAIN = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS["llama"]}


@pytest.fixture
def adapters(tmp_path: Path) -> list[LoraAdapter]:
    return peft_pool(tiny_model(), dict.fromkeys(("one", "two", "three"), PLAIN), tmp_path)[1]


@torch.inference_mode()
def test_a_fused_adapter_adds_the_product_of_the_averages(adapters: list[LoraAdapter]) -> None:
    model, by_hand = tiny_model(), tiny_model()
    for path in adapters[0].pairs:
        down = sum(adapter.pairs[path].down_RI for adapter in adapters) / 3
        up = sum(adapter.pairs[path].up_OR for adapter in adapters) / 3
        by_hand.get_submodule(path).weight += 6 / 3 * up @ down

    routes = [Route(("all",), (1.0,))] * 2
    with (
        attached(model, [fuse(adapters, name="all")]) as pool,
        pool.mixing(pool.mix(routes)),
    ):
        found = model(IDS).logits

    torch.testing.assert_close(found, by_hand(IDS).logits, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(found, model(IDS).logits, atol=0.1)


def test_the_order_does_not_matter_and_one_adapter_stays_itself(
    adapters: list[LoraAdapter],
) -> None:
    forward, backward = fuse(adapters, name="x"), fuse(adapters[::-1], name="x")
    alone = fuse(adapters[:1], name="one")
    for path, pair in adapters[0].pairs.items():
        torch.testing.assert_close(forward.pairs[path].up_OR, backward.pairs[path].up_OR)
        torch.testing.assert_close(forward.pairs[path].down_RI, backward.pairs[path].down_RI)
        assert torch.equal(alone.pairs[path].up_OR, pair.up_OR)
        assert torch.equal(alone.pairs[path].down_RI, pair.down_RI)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 2}, "their ranks at model.layers.0.self_attn.q_proj are 3 and 2"),
        ({"lora_alpha": 9}, "their scalings at model.layers.0.self_attn.q_proj are 2 and 3"),
        (
            {"target_modules": ["q_proj"]},
            "only one of them changes model.layers.0.self_attn.v_proj",
        ),
    ],
)
def test_adapters_that_are_not_alike_are_refused_by_name(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    _, pool = peft_pool(tiny_model(), {"one": PLAIN, "other": PLAIN | change}, tmp_path)

    with pytest.raises(AdapterError) as caught:
        fuse(pool, name="both")

    assert str(caught.value) == f"adapters 'one' and 'other' cannot be fused: {message}"


@pytest.fixture
def fusing(adapters: list[LoraAdapter]) -> Iterator[Pool]:
    with attached(tiny_model(), adapters, pool_type=FusionPool) as pool:
        yield pool


def average(pool: Pool, *names: str) -> Resident:
    """Return what a pool takes for a route to adapters of some weights."""
    weights = [0.7, 0.2, 0.1][: len(names)]
    ((resident, weight),) = pool.row(Route(names, tuple(w / sum(weights) for w in weights)))
    assert weight == 1
    assert isinstance(resident, Resident)
    return resident


def test_a_pool_averages_the_same_members_once_in_any_order(
    fusing: Pool, adapters: list[LoraAdapter]
) -> None:
    found = average(fusing, "one", "two")
    assert average(fusing, "two", "one") is found
    assert average(fusing, "one", "three") is not found
    expected = fusing.layers.add(fuse([adapters[1], adapters[0]], name="x"))
    assert found.sha256 == expected.sha256
    assert fusing.row(BASE_ROUTE) == ()


def test_a_member_that_is_replaced_is_averaged_again(
    fusing: Pool, adapters: list[LoraAdapter]
) -> None:
    earlier = average(fusing, "one", "two")
    fusing.remove("two")
    with pytest.raises(RouterError, match="no adapter 'two'; there are: one, three"):
        average(fusing, "one", "two")
    fusing.add(replace(adapters[2], name="two"))
    expected = average(fusing, "one", "three")
    found = average(fusing, "one", "two")
    assert found.sha256 == expected.sha256 != earlier.sha256


def test_a_pool_keeps_the_averages_used_last(fusing: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlplora.lora.fusion._KEPT", 2)
    one, two = average(fusing, "one"), average(fusing, "two")
    assert average(fusing, "one") is one
    average(fusing, "three")
    assert average(fusing, "one") is one
    assert average(fusing, "two") is not two


@pytest.mark.parametrize("policy", ["keep", "refill"])
def test_an_answer_is_rerouted_to_averages_as_to_adapters_made_beforehand(
    adapters: list[LoraAdapter], policy: Policy
) -> None:
    base = tiny_base(lines=True)
    routes = [Route(names, (0.5, 0.5)) for names in (("one", "two"), ("three", "one"))]

    def answers(pool: Pool, routes: Sequence[Route]) -> list[Answer]:
        sampling = Sampling(max_new_tokens=20, temperature=3.0)
        requests = [
            Request("say red", replace(sampling, seed=seed), tuple(routes), policy, num_answers=2)
            for seed in range(20)
        ]
        return Runner(base, pool).generate(requests)

    with attached(base.model, adapters, pool_type=FusionPool) as pool:
        found = answers(pool, routes)
    by_name = {adapter.name: adapter for adapter in adapters}
    made = [
        fuse([by_name[name] for name in sorted(route.adapters)], name="+".join(route.adapters))
        for route in routes
    ]
    with attached(base.model, made) as pool:
        expected = answers(pool, [Route((adapter.name,), (1.0,)) for adapter in made])
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    begun = [part.route for answer in found for part in answer.parts[1:] if part.text]
    assert begun
    assert set(begun) == {routes[1]}
