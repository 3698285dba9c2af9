"""Fused layers against PEFT's own single-adapter forwards."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dlplora.adapters import LoraPair
from dlplora.errors import AdapterError, RouterError
from dlplora.lora.attach import attached
from dlplora.lora.fused import Mix, StackedLora
from dlplora.records.routes import BASE_ROUTE, Route
from tests.peft_adapters import peft_model, peft_pool, save_peft
from tests.tiny import FAN_IN_FAN_OUT, TARGETS, tiny_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])
KINDS = list(TARGETS)


def configs(kind: str) -> dict[str, dict[str, Any]]:
    targets = TARGETS[kind]
    every = {
        "one": {"r": 2, "lora_alpha": 4, "target_modules": targets},
        "two": {"r": 5, "lora_alpha": 3, "target_modules": targets[:1]},
        "three": {"r": 4, "lora_alpha": 8, "target_modules": targets, "use_rslora": True},
        "four": {
            "r": 3,
            "lora_alpha": 6,
            "target_modules": targets,
            "rank_pattern": {f"0.*{targets[0]}": 6},
            "alpha_pattern": {targets[-1]: 1.5},
        },
    }
    return {
        name: config | {"fan_in_fan_out": FAN_IN_FAN_OUT[kind]} for name, config in every.items()
    }


def deltas_by_peft(model: Any, layer: nn.Module, path: str, x: Tensor) -> Tensor:
    """What PEFT's adapter adds to one linear layer: its output less the frozen layer's."""
    wrapped = model.base_model.model.get_submodule(path)
    with torch.no_grad():
        delta: Tensor = wrapped(x) - layer(x)
    return delta


@pytest.mark.parametrize("kind", KINDS)
def test_a_mix_gives_the_plain_sum_of_pefts_deltas(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    by_peft, adapters = peft_pool(model, configs(kind), tmp_path)
    weights = torch.tensor([[0.5, 0.2, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    for path in {path for adapter in adapters for path in adapter.pairs}:
        layer = model.get_submodule(path)
        num_inputs = next(a.pairs[path].down_RI.shape[1] for a in adapters if path in a.pairs)
        x = torch.randn(3, 7, num_inputs, generator=torch.Generator().manual_seed(1))
        expected = layer(x)
        for column, adapter in enumerate(adapters):
            if path in adapter.pairs:
                delta = deltas_by_peft(by_peft[adapter.name], layer, path, x)
                expected = expected + weights[:, column, None, None] * delta
        mix = Mix()
        fused = StackedLora(layer, [adapter.pairs.get(path) for adapter in adapters], mix)
        with mix.using(weights):
            torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_one_hot_route_is_peft_with_that_adapter(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    by_peft, adapters = peft_pool(model, configs(kind), tmp_path)
    routes = [Route(("three",), (1.0,)), Route(("one",), (1.0,)), Route(("four",), (1.0,))]
    with attached(model, adapters) as pool, pool.mixing(pool.weights(routes)):
        found = model(IDS).logits
    for row, route in enumerate(routes):
        expected = by_peft[route.adapters[0]](IDS).logits[row]
        torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_each_prompt_alone(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    _, adapters = peft_pool(model, configs(kind), tmp_path)
    routes = [
        Route(("one", "two"), (0.75, 0.25)),
        BASE_ROUTE,
        Route(("four", "three", "one"), (0.5, 0.3, 0.2)),
    ]
    with attached(model, adapters) as pool:
        with pool.mixing(pool.weights(routes)):
            batched = model(IDS).logits
        for row, route in enumerate(routes):
            with pool.mixing(pool.weights([route])):
                alone = model(IDS[row : row + 1]).logits[0]
            torch.testing.assert_close(batched[row], alone, atol=1e-5, rtol=1e-5)


def test_base_routes_and_no_mix_give_the_base_model(tmp_path: Path) -> None:
    model = tiny_model()
    expected = model(IDS).logits
    _, adapters = peft_pool(model, configs("llama"), tmp_path)
    with attached(model, adapters) as pool:
        assert torch.equal(model(IDS).logits, expected)
        with pool.mixing(pool.weights([BASE_ROUTE] * 3)):
            torch.testing.assert_close(model(IDS).logits, expected, atol=0, rtol=0)


def test_detaching_restores_the_very_layers_of_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: id(module) for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    _, adapters = peft_pool(model, configs("llama"), tmp_path)
    failure = None
    try:
        with attached(model, adapters):
            assert any(isinstance(module, StackedLora) for module in model.modules())
            raise ZeroDivisionError
    except ZeroDivisionError as error:
        failure = error
    assert failure is not None
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_two_threads_on_one_model_keep_their_own_routes(tmp_path: Path) -> None:
    model = tiny_model()
    _, adapters = peft_pool(model, configs("llama"), tmp_path)
    names = [adapter.name for adapter in adapters]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    barrier = threading.Barrier(len(names))
    with attached(model, adapters) as pool:
        expected = {}
        for name in names:
            with pool.mixing(pool.weights([Route((name,), (1.0,))] * 3)):
                expected[name] = model(IDS).logits

        def answer(name: str) -> None:
            for _ in range(20):
                barrier.wait()
                with torch.no_grad(), pool.mixing(pool.weights([Route((name,), (1.0,))] * 3)):
                    found[name].append(model(IDS).logits)

        threads = [threading.Thread(target=answer, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name in names:
        assert len(found[name]) == 20
        assert all(torch.equal(row, expected[name]) for row in found[name])


def test_the_sum_is_in_the_dtype_of_the_activations() -> None:
    layer = nn.Linear(6, 4).to(torch.bfloat16)
    mix = Mix()
    fused = StackedLora(layer, [LoraPair(torch.randn(2, 6), torch.randn(4, 2), 0.5)], mix)
    with mix.using(torch.ones(3, 1)):
        assert fused(torch.randn(3, 5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_adapter_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    wide = peft_model(tiny_model(hidden=32), seed=0, r=2, target_modules=["q_proj"])
    adapter = save_peft(wide, tmp_path / "wide")
    with pytest.raises(AdapterError, match=r"'wide': .*q_proj maps 32 to 32, .* 16 to 16"):
        attached(tiny_model(), [adapter]).__enter__()


def test_an_adapter_for_a_layer_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    model = peft_model(
        tiny_model("gpt2"), seed=0, r=2, target_modules=["c_attn"], fan_in_fan_out=True
    )
    adapter = save_peft(model, tmp_path / "other")
    with pytest.raises(AdapterError, match=r"'other': the base model has no layer transformer"):
        attached(tiny_model(), [adapter]).__enter__()


def test_a_route_to_an_unknown_adapter_lists_those_there_are(tmp_path: Path) -> None:
    model = tiny_model()
    _, adapters = peft_pool(model, configs("llama"), tmp_path)
    with attached(model, adapters) as pool, pytest.raises(RouterError, match="four, one, three"):
        pool.weights([Route(("five",), (1.0,))])
