"""Fused layers against PEFT's own single-adapter forwards."""

import copy
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import AdapterError, RouterError
from dlplora.lora.attach import Pool, attached
from dlplora.lora.fused import FusedLinear, OneInput
from dlplora.lora.layers import FusedLayers
from dlplora.lora.layout import Form, choose_form
from dlplora.lora.mix import BatchMix
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


@dataclass(frozen=True)
class Pooled:
    """A model with several adapters, ours and PEFT's."""

    model: PreTrainedModel
    by_peft: dict[str, Any]
    adapters: list[LoraAdapter]

    def plain_sum(self, path: str, x_BSI: Tensor, routes: list[Route]) -> Tensor:
        """What a layer gives by PEFT: its base layer's output and each adapter's, one by one."""
        layers = {
            name: model.base_model.model.get_submodule(path) for name, model in self.by_peft.items()
        }
        found: Tensor = getattr(layers["one"], "base_layer", layers["one"])(x_BSI)
        for row, route in enumerate(routes):
            x, layer = x_BSI[row], self.model.get_submodule(f"{path}.base")
            for name, weight in route.mix:
                found[row] += weight * (layers[name](x) - layer(x))
        return found


@pytest.fixture(scope="module", params=KINDS)
def pooled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pooled:
    model = tiny_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    return Pooled(model, *peft_pool(model, configs(request.param), folder))


@st.composite
def some_routes(draw: st.DrawFn) -> list[Route]:
    """Routes of some prompts, several of them alike."""
    kinds = []
    for _ in range(draw(st.integers(1, 3))):
        chosen = draw(st.lists(st.sampled_from(["one", "two", "three", "four"]), unique=True))
        parts = [draw(st.integers(1, 9)) for _ in chosen]
        kinds.append(Route(tuple(chosen), tuple(part / sum(parts) for part in parts)))
    return draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=6))


FORMS: list[Form | None] = ["stacked", "gathered", "bagged", None]


@settings(deadline=None, max_examples=40)
@given(
    routes=some_routes(),
    num_tokens=st.sampled_from([1, 2, 9, 70]),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 99),
)
def test_a_mix_gives_the_plain_sum_of_pefts_deltas_in_every_form(
    pooled: Pooled, routes: list[Route], num_tokens: int, form: Form | None, seed: int
) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.no_grad(),
        attached(pooled.model, pooled.adapters) as pool,
    ):
        if form is not None and (form != "bagged" or num_tokens == 1):
            patch.setattr("dlplora.lora.layout.choose_form", lambda **_: form)
        for path in sorted({path for adapter in pooled.adapters for path in adapter.pairs}):
            adapter = next(adapter for adapter in pooled.adapters if path in adapter.pairs)
            x = torch.randn(
                len(routes),
                num_tokens,
                adapter.pairs[path].down_RI.shape[1],
                generator=torch.Generator().manual_seed(seed),
            )
            with pool.mixing(pool.mix(routes)):
                found = pooled.model.get_submodule(path)(x)
            expected = pooled.plain_sum(path, x, routes)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 70])
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_the_plain_sum_up_to_its_noise(
    pooled: Pooled, num_tokens: int, form: Form | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form is not None and (form != "bagged" or num_tokens == 1):
        monkeypatch.setattr("dlplora.lora.layout.choose_form", lambda **_: form)
    routes = [Route(("one",), (1.0,)), Route(("four", "two"), (0.75, 0.25)), BASE_ROUTE]
    halved = copy.deepcopy(pooled.model).to(torch.bfloat16)
    with torch.no_grad(), attached(halved, pooled.adapters) as pool:
        for path, pair in pooled.adapters[0].pairs.items():
            x = torch.randn(3, num_tokens, pair.down_RI.shape[1]).to(torch.bfloat16)
            layer = halved.get_submodule(path)
            with pool.mixing(pool.mix(routes)):
                found = layer(x)
            exact = layer.base.float()(x.float())
            for row, route in enumerate(routes):
                for name, weight in route.mix:
                    if path in (pairs := next(a for a in pooled.adapters if a.name == name).pairs):
                        delta = pairs[path].up_OR @ (pairs[path].down_RI @ x[row].float().T)
                        exact[row] += weight * pairs[path].scaling * delta.T
            assert found.dtype is torch.bfloat16
            torch.testing.assert_close(found.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("expected", "num_prompts", "num_tokens", "one_mix", "ranks", "own"),
    [
        ("shared", 16, 64, True, 24, 24),
        ("shared", 1, 1, True, 24, 24),
        ("gathered", 16, 64, False, 208, 24),
        ("bagged", 16, 1, False, 208, 24),
        ("stacked", 4, 1, False, 48, 24),
        ("stacked", 16, 64, False, 32, 24),
        ("stacked", 16, 3, False, 208, 24),
    ],
)
def test_the_form_follows_the_rule(
    expected: str, num_prompts: int, num_tokens: int, one_mix: bool, ranks: int, own: int
) -> None:
    assert expected == choose_form(
        num_prompts=num_prompts, num_tokens=num_tokens, one_mix=one_mix, ranks=ranks, own=own
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_one_hot_route_is_peft_with_that_adapter(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    by_peft, adapters = peft_pool(model, configs(kind), tmp_path)
    routes = [Route(("three",), (1.0,)), Route(("one",), (1.0,)), Route(("four",), (1.0,))]
    with attached(model, adapters) as pool, pool.mixing(pool.mix(routes)):
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
        with pool.mixing(pool.mix(routes)):
            batched = model(IDS).logits
        for row, route in enumerate(routes):
            with pool.mixing(pool.mix([route])):
                alone = model(IDS[row : row + 1]).logits[0]
            torch.testing.assert_close(batched[row], alone, atol=1e-5, rtol=1e-5)


def _inputs_read(kind: str) -> list[set[str]]:
    """The layers of a tiny model's first block that read one input."""
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    separate = [{f"{attention}.{name}_proj" for name in "qkv"}, {f"{attention}.o_proj"}]
    separate += [{f"{mlp}.gate_proj", f"{mlp}.up_proj"}, {f"{mlp}.down_proj"}]
    return {"llama": separate, "qwen2": separate}.get(kind, [])


def fused_paths(model: nn.Module) -> set[str]:
    return {path for path, one in model.named_modules() if isinstance(one, FusedLinear)}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_read_one_input_are_found(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    _, adapters = peft_pool(model, configs(kind), tmp_path)
    with attached(model, adapters) as pool:
        assert pool.layers.groups.keys() == fused_paths(model)
        sizes = {len(group) for group in pool.layers.groups.values()}
        assert sizes == ({2} if kind in {"llama", "qwen2", "sliding"} else {1})
        for path, group in pool.layers.groups.items():
            assert path in group
            assert all(pool.layers.groups[other] == group for other in group)
            for read in _inputs_read(kind):
                if path in read:
                    assert set(group) == read & pool.layers.groups.keys()


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_go_down_together_give_what_each_gives_alone(
    kind: str, form: Form | None, num_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form is not None and (form != "bagged" or num_tokens == 1):
        monkeypatch.setattr("dlplora.lora.layout.choose_form", lambda **_: form)
    model = tiny_model(kind)
    _, adapters = peft_pool(model, configs(kind), tmp_path)
    routes = [Route(("two",), (1.0,)), BASE_ROUTE, Route(("four", "one"), (0.5, 0.5))]
    ids = torch.randint(0, 30, (3, num_tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attached(model, adapters) as pool:
        together = pool.mix(routes)
        alone = BatchMix(together.rows, {})
        with pool.mixing(together):
            found = model(ids).logits
            again = model(ids).logits
        with pool.mixing(alone):
            expected = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, again)


def test_one_input_is_worked_on_once_and_then_let_go() -> None:
    worked = []

    def down(x_BSI: Tensor) -> Tensor:
        worked.append(x_BSI)
        return x_BSI * 2

    source = OneInput(down, [1, 2])
    x, other = torch.randn(2, 1, 3), torch.randn(2, 1, 3)
    assert torch.equal(source.part(0, x), 2 * x[..., :1])
    assert torch.equal(source.part(1, x), 2 * x[..., 1:])
    assert len(worked) == 1
    assert source._x is None
    assert not source._parts
    assert torch.equal(source.part(1, x), 2 * x[..., 1:])  # a second pass, in another order
    assert torch.equal(source.part(1, other), 2 * other[..., 1:])  # one that is not asked again
    assert torch.equal(source.part(0, other), 2 * other[..., :1])
    assert len(worked) == 3


def test_base_routes_and_no_mix_give_the_base_model(tmp_path: Path) -> None:
    model = tiny_model()
    expected = model(IDS).logits
    _, adapters = peft_pool(model, configs("llama"), tmp_path)
    with attached(model, adapters) as pool:
        assert torch.equal(model(IDS).logits, expected)
        with pool.mixing(pool.mix([BASE_ROUTE] * 3)):
            torch.testing.assert_close(model(IDS).logits, expected, atol=0, rtol=0)


def test_detaching_restores_the_very_layers_of_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: id(module) for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    _, adapters = peft_pool(model, configs("llama"), tmp_path)
    failure = None
    try:
        with attached(model, adapters):
            assert any(isinstance(module, FusedLinear) for module in model.modules())
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
            with pool.mixing(pool.mix([Route((name,), (1.0,))] * 3)):
                expected[name] = model(IDS).logits

        def answer(name: str) -> None:
            for _ in range(20):
                barrier.wait()
                with torch.no_grad(), pool.mixing(pool.mix([Route((name,), (1.0,))] * 3)):
                    found[name].append(model(IDS).logits)

        threads = [threading.Thread(target=answer, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name in names:
        assert len(found[name]) == 20
        assert all(torch.equal(row, expected[name]) for row in found[name])


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
        pool.mix([Route(("five",), (1.0,))])


def test_adapters_come_and_go_while_a_batch_runs(tmp_path: Path) -> None:
    model = tiny_model()
    by_peft, adapters = peft_pool(model, configs("llama"), tmp_path)
    one, two, three, _ = adapters
    pool = Pool(FusedLayers(model))
    pool.add(one)
    begun = pool.mix([Route(("one",), (1.0,))])
    pool.remove("one")
    pool.add(two)
    pool.add(three)
    assert pool.names == ("two", "three")
    with torch.no_grad():
        with pool.mixing(begun):  # a batch ends with the adapters that it began with
            torch.testing.assert_close(
                model(IDS[:1]).logits, by_peft["one"](IDS[:1]).logits, atol=1e-4, rtol=1e-4
            )
        with pool.mixing(pool.mix([Route(("three",), (1.0,))])):
            torch.testing.assert_close(
                model(IDS[:1]).logits, by_peft["three"](IDS[:1]).logits, atol=1e-4, rtol=1e-4
            )
    with pytest.raises(RouterError, match="no adapter 'one'; there are: three, two"):
        pool.mix([Route(("one",), (1.0,))])
    with pytest.raises(RouterError, match="no adapter 'one'"):
        pool.remove("one")
    with pytest.raises(AdapterError, match="there is an adapter 'two' already"):
        pool.add(two)
    pool.layers.unwrap()
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_adapters_come_and_go_while_threads_generate(tmp_path: Path) -> None:
    model = tiny_model()
    wider = {
        target: {"r": 2, "target_modules": [target]}
        for target in ("o_proj", "gate_proj", "up_proj", "down_proj")
    }
    _, adapters = peft_pool(model, configs("llama") | wider, tmp_path)
    pool = Pool(FusedLayers(model))
    pool.add(adapters[0])
    route = [Route(("one",), (1.0,))] * 3
    with torch.no_grad(), pool.mixing(pool.mix(route)):
        expected = model(IDS).logits
    found = []
    ended = threading.Event()

    def answer() -> None:
        with torch.no_grad():
            while not ended.is_set():
                with pool.mixing(pool.mix(route)):
                    found.append(model(IDS).logits)

    threads = [threading.Thread(target=answer) for _ in range(2)]
    for thread in threads:
        thread.start()
    before = len(fused_paths(model))
    for adapter in [*adapters[1:] * 4]:  # the last ones change layers that were not fused yet
        pool.add(adapter)
        pool.remove(adapter.name)
    ended.set()
    for thread in threads:
        thread.join()
    assert found
    assert len(fused_paths(model)) == before + len(wider) * model.config.num_hidden_layers
    assert all(torch.equal(logits, expected) for logits in found)


def test_an_adapter_of_the_output_head_is_refused_and_changes_nothing() -> None:
    model = tiny_model()
    inner = LoraPair(torch.randn(2, 16), torch.randn(16, 2), 1.0)
    head = LoraPair(torch.randn(2, 16), torch.randn(model.config.vocab_size, 2), 1.0)
    pairs = {"model.layers.0.self_attn.q_proj": inner, "lm_head": head}
    pool = Pool(FusedLayers(model))
    with pytest.raises(AdapterError, match="'mine': lm_head is the model's output head"):
        pool.add(LoraAdapter("mine", pairs))
    assert pool.names == ()
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_a_quantised_layer_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = save_peft(peft_model(model, seed=0, r=2, target_modules=["q_proj"]), tmp_path / "q")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"q_proj holds torch\.uint8, which cannot be fused"):
        Pool(FusedLayers(model)).add(adapter)


def test_a_model_that_fails_when_adapters_are_attached_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = save_peft(peft_model(model, seed=0, r=2, target_modules=["q_proj"]), tmp_path / "q")
    before = {name: id(module) for name, module in model.named_modules()}
    broken = model.register_forward_pre_hook(lambda *_: 1 / 0)
    pool = Pool(FusedLayers(model))
    with pytest.raises(ZeroDivisionError):
        pool.add(adapter)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert pool.names == ()
    broken.remove()
    pool.add(adapter)
    assert fused_paths(model) == adapter.pairs.keys()


def test_pools_share_the_fused_layers_of_a_model_and_no_others_are_put_on_them(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    _, adapters = peft_pool(model, configs("llama"), tmp_path)
    layers = FusedLayers(model)
    first, second = Pool(layers), Pool(layers)
    first.add(adapters[0])
    second.add(replace(adapters[1], name=adapters[0].name))
    rows = [pool.row(Route((adapters[0].name,), (1.0,))) for pool in (first, second)]
    with torch.no_grad(), layers.mixing(layers.mix(rows)):
        both = model(IDS[:1].repeat(2, 1)).logits
    for row, logits in zip(rows, both, strict=True):
        with torch.no_grad(), layers.mixing(layers.mix([row])):
            torch.testing.assert_close(model(IDS[:1]).logits[0], logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=0.1)
    with pytest.raises(AdapterError, match="is wrapped already by others"):
        Pool(FusedLayers(model)).add(adapters[1])
