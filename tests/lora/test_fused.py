"""Fused layers against PEFT's own single-adapter forwards."""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
from dlplora.lora.fused import (
    Bagged,
    FusedLinear,
    Gathered,
    OneMix,
    Weighted,
    lay_out,
    reference,
)
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import BatchMix
from dlplora.lora.picked import Picked
from dlplora.lora.stacks import Resident, Stack
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


Kind = type[Gathered | Bagged]
FORMS = [Gathered, Bagged, None]


def always(form: Kind) -> Callable[..., Gathered | Bagged]:
    """Lay batches out in one form, whatever is fastest."""

    def chosen(places: Weighted, *, like: Tensor, **told: Any) -> Gathered | Bagged:
        del told["is_one_mix"]
        if form is Gathered:
            del told["num_tokens"], told["num_places"]
        return form(places, like=like, **told)

    return chosen


@settings(deadline=None, max_examples=40)
@given(
    routes=some_routes(),
    num_tokens=st.sampled_from([1, 2, 9, 70]),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 99),
)
def test_a_mix_gives_the_plain_sum_of_pefts_deltas_in_every_form(
    pooled: Pooled,
    routes: list[Route],
    num_tokens: int,
    form: Kind | None,
    seed: int,
) -> None:
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.no_grad(),
        attached(pooled.model, pooled.adapters) as pool,
    ):
        if form is not None:
            patch.setattr("dlplora.lora.mix.lay_out", always(form))
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
    pooled: Pooled,
    num_tokens: int,
    form: Kind | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if form is not None:
        monkeypatch.setattr("dlplora.lora.mix.lay_out", always(form))
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


MIXES = [[("a", 0.5), ("b", 0.25)], [("c", 1.0), ("a", -0.5)], [], [("b", 0.125), ("d", 2.0)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("kind", ["one_mix", "large_mix", "gathered", "bagged"])
def test_every_form_is_the_reference(kind: str, num_tokens: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    stack, picked, residents = Stack(), Picked(), {}
    for name, ranks in zip("abcd", [{"q": 2, "v": 2}, {"v": 3}, {"q": 5, "v": 1}, {}], strict=True):
        residents[name] = one = Resident(tuple(ranks), None)
        pairs = {
            path: LoraPair(drawn(rank, 16), drawn({"q": 12, "v": 8}[path], rank), 1.0)
            for path, rank in ranks.items()
        }
        if pairs:
            one.rows[stack] = stack.add(pairs, drawn(1))
        picked.add([one])
        picked.rows(stack)
    mixes = MIXES[:1] * 4 if kind.endswith("mix") else MIXES
    mixed = [[(residents[name], weight) for name, weight in mix] for mix in mixes]
    places = [[(place, w) for one, w in mix for place in picked.places[one]] for mix in mixed]
    rows = [[(row, w) for one, w in mix for row in one.rows.get(stack, ())] for mix in mixed]
    form = {
        "one_mix": partial(OneMix, num_tokens=num_tokens),
        "large_mix": partial(OneMix, num_tokens=10_000),  # too large for float32
        "gathered": partial(Gathered, num_layers=2),
        "bagged": partial(
            Bagged, num_places=picked.num_places, num_layers=2, num_tokens=num_tokens
        ),
    }[kind](places, like=drawn(1))
    matrices, x = stack.matrices, drawn(4, num_tokens, 16)
    prepared = form.prepare(stack, matrices, picked)
    hidden = form.shrink(prepared, x)
    for layer, (_, down, up) in enumerate(matrices.by_path()):
        y = drawn(4, num_tokens, up.shape[1])
        expected = reference(x, y, rows, down_NI=down, up_NO=up)
        form.expand(prepared, layer, hidden[layer], y)
        close = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(y.float(), expected, atol=close, rtol=close / 5)


@pytest.mark.parametrize(
    ("expected", "device", "num_tokens", "is_one_mix"),
    [
        (OneMix, "cpu", 64, True),
        (OneMix, "meta", 1, True),
        (Gathered, "cpu", 64, False),
        (Bagged, "cpu", 7, False),
        (Gathered, "meta", 7, False),
        (Bagged, "meta", 1, False),
    ],
)
def test_the_form_follows_device_and_batch(
    expected: type, device: str, num_tokens: int, is_one_mix: bool
) -> None:
    like = torch.empty(1, device=device)
    told = {"num_tokens": num_tokens, "num_layers": 2, "num_places": 9, "like": like}
    places = [[(4, 0.5), (8, 0.5)], [(2, 1.0)], []]
    assert type(lay_out(places, is_one_mix=is_one_mix, **told)) is expected


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


def fused_paths(model: nn.Module) -> set[str]:
    return {path for path, one in model.named_modules() if isinstance(one, FusedLinear)}


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_input_give_in_a_model_what_each_gives_by_itself(
    kind: str,
    form: Kind | None,
    num_tokens: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if form is not None:
        monkeypatch.setattr("dlplora.lora.mix.lay_out", always(form))
    model = tiny_model(kind)
    by_peft, adapters = peft_pool(model, configs(kind), tmp_path)
    pooled = Pooled(model, by_peft, adapters)
    routes = [Route(("two",), (1.0,)), BASE_ROUTE, Route(("four", "one"), (0.5, 0.5))]
    ids = torch.randint(0, 30, (3, num_tokens), generator=torch.Generator().manual_seed(0))
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(path: str, _: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        seen.setdefault(path, []).append((given[0], output.clone()))

    with torch.no_grad(), attached(model, adapters) as pool:
        for path in fused_paths(model):
            model.get_submodule(path).register_forward_hook(partial(note, path))
        with pool.mixing(pool.mix(routes)):
            first, again = (model(ids).logits for _ in range(2))
        assert seen.keys() == fused_paths(model)
        for path, calls in seen.items():
            assert len(calls) == 2
            for x, output in calls:
                expected = pooled.plain_sum(path, x, routes)
                torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(first, again)


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
    with torch.no_grad(), layers.mixing(BatchMix(rows)):
        both = model(IDS[:1].repeat(2, 1)).logits
    for row, logits in zip(rows, both, strict=True):
        with torch.no_grad(), layers.mixing(BatchMix([row])):
            torch.testing.assert_close(model(IDS[:1]).logits[0], logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=0.1)
    with pytest.raises(AdapterError, match="is wrapped already by others"):
        Pool(FusedLayers(model)).add(adapters[1])
