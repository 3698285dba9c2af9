"""Fused matrices against plain averages, and against the model's own forward."""

from pathlib import Path

import pytest
import torch

from dlplora.adapters import LoraAdapter
from dlplora.errors import AdapterError
from dlplora.lora.attach import attached
from dlplora.lora.fusion import fuse
from dlplora.records.routes import Route
from tests.peft_adapters import peft_pool
from tests.tiny import TARGETS, tiny_model

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
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
