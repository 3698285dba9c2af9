"""Adapters in stacked matrices: copied once, packed by row, grown and paged while batches run."""

import gc
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.engine.prefix_cache import PrefixCache
from dlplora.errors import AdapterError, GenerationError, RouterError
from dlplora.lora.attach import Pool
from dlplora.lora.fused import FusedLinear
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import BatchMix, Row
from dlplora.lora.paging import PagedPool
from dlplora.records.routes import Route
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])
SIZES = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (16, 8), "mlp.down_proj": (32, 16)}


def made(name: str, rank: int, *, layers: Sequence[str] = ("self_attn.q_proj",)) -> LoraAdapter:
    """An adapter of random matrices, by its name."""
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    pairs = {}
    for block in range(2):
        for layer in layers:
            num_in, num_out = SIZES[layer]
            down = torch.randn(rank, num_in, generator=draw)
            up = torch.randn(num_out, rank, generator=draw)
            pairs[f"model.layers.{block}.{layer}"] = LoraPair(down, up, 0.5)
    return LoraAdapter(name, pairs)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture
def layers(model: PreTrainedModel) -> Iterator[FusedLayers]:
    layers = FusedLayers(model)
    yield layers
    layers.unwrap()


def logits(pool: Pool, *names: str) -> Tensor:
    """Answer by adapters of equal weights."""
    route = Route(names, (1 / len(names),) * len(names))
    with torch.no_grad(), pool.mixing(pool.mix([route])):
        found: Tensor = pool.layers.model(IDS).logits
    return found


def alone(*adapters: LoraAdapter) -> Tensor:
    """Answer by adapters of equal weights, in a model that has no others."""
    pool = Pool(FusedLayers(tiny_model()))
    for adapter in adapters:
        pool.add(adapter)
    return logits(pool, *(adapter.name for adapter in adapters))


def num_bytes(layers: FusedLayers) -> int:
    """What stacks hold, free rows and reserves too."""
    stacks = {one.stack for one in layers.model.modules() if isinstance(one, FusedLinear)}
    return sum(
        matrix.nbytes
        for stack in stacks
        if stack is not None
        for matrix in (stack.matrices.down, *stack.matrices.ups)
    )


def test_ranks_are_packed_by_row(layers: FusedLayers) -> None:
    adapters = [made(f"a{number}", 8) for number in range(99)] + [made("wide", 64)]
    pool = Pool(layers)
    for adapter in adapters:
        pool.add(adapter)
    needed = sum(layers.num_bytes(adapter) for adapter in adapters)
    assert needed == 4 * (99 * 8 + 64) * (16 + 16) * 2
    assert num_bytes(layers) <= 2 * needed  # stacks double
    for names in (["wide"], ["a0", "a98"], ["wide", "a7"]):
        own = [adapter for adapter in adapters if adapter.name in names]
        torch.testing.assert_close(logits(pool, *names), alone(*own), atol=1e-5, rtol=1e-5)


def test_rows_of_adapters_that_left_are_used_again(layers: FusedLayers) -> None:
    pool = Pool(layers)
    for rank, name in ((3, "one"), (5, "two"), (2, "three")):
        pool.add(made(name, rank))
    before = num_bytes(layers)
    for number in range(40):
        pool.remove("two" if number == 0 else f"next{number - 1}")
        pool.add(made(f"next{number}", 5 - number % 3))
    assert num_bytes(layers) == before
    for name, rank in (("one", 3), ("three", 2), ("next39", 5)):
        torch.testing.assert_close(
            logits(pool, name), alone(made(name, rank)), atol=1e-5, rtol=1e-5
        )


def test_a_batch_keeps_its_rows_until_it_ends(layers: FusedLayers) -> None:
    pool = Pool(layers)
    pool.add(made("one", 4))
    expected = logits(pool, "one")
    mix = pool.mix([Route(("one",), (1.0,))])
    pool.remove("one")
    for number in range(6):  # also doubles the stacks, before and after the batch's first layer
        pool.add(made(f"other{number}", 4))
        with torch.no_grad(), pool.mixing(mix):
            assert torch.equal(pool.layers.model(IDS).logits, expected)
    size = num_bytes(layers)
    del mix
    gc.collect()
    pool.add(made("last", 4))
    assert num_bytes(layers) == size


def test_a_layer_that_gets_its_first_adapter_later_joins_the_others(layers: FusedLayers) -> None:
    pool = Pool(layers)
    pool.add(made("one", 3))
    begun = pool.mix([Route(("one",), (1.0,))])
    expected = logits(pool, "one")
    with torch.no_grad(), pool.mixing(begun):
        pool.layers.model(IDS)
    wide = made("all", 2, layers=list(SIZES))
    pool.add(wide)
    torch.testing.assert_close(logits(pool, "all"), alone(wide), atol=1e-5, rtol=1e-5)
    both = logits(pool, "one", "all")
    torch.testing.assert_close(both, alone(made("one", 3), wide), atol=1e-5, rtol=1e-5)
    with torch.no_grad(), pool.mixing(begun):
        assert torch.equal(pool.layers.model(IDS).logits, expected)


def test_an_adapter_that_cannot_be_added_leaves_the_stacks_as_they_were(
    layers: FusedLayers, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(layers)
    pool.add(made("one", 3))
    before, expected = num_bytes(layers), logits(pool, "one")
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", lambda *_, **__: 1 / 0)  # no memory for larger stacks
        with pytest.raises(ZeroDivisionError):
            pool.add(made("wide", 64))
    pool.add(made("two", 3))
    assert num_bytes(layers) <= 2 * before + 4 * 32 * 4
    assert torch.equal(logits(pool, "one"), expected)
    torch.testing.assert_close(logits(pool, "two"), alone(made("two", 3)), atol=1e-5, rtol=1e-5)


def test_an_adapter_whose_values_overflow_is_refused_by_name(layers: FusedLayers) -> None:
    good = made("good", 3)
    bad = LoraAdapter("bad", {k: replace(v, scaling=1e39) for k, v in good.pairs.items()})
    pool = Pool(layers)
    with pytest.raises(AdapterError, match=r"adapter 'bad': .*q_proj: its values, scaled, are too"):
        pool.add(bad)
    pool.add(good)
    torch.testing.assert_close(logits(pool, "good"), alone(good), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_a_prompt_whose_values_overflow_spoils_no_other(
    layers: FusedLayers, num_tokens: int
) -> None:
    pool = Pool(layers)
    wide = made("huge", 5, layers=["self_attn.q_proj", "self_attn.v_proj"])
    huge = {k: replace(v, down_RI=torch.full_like(v.down_RI, 3e38)) for k, v in wide.pairs.items()}
    pool.add(LoraAdapter("huge", huge))
    pool.add(made("good", 3))
    route = Route(("good",), (1.0,))
    ids = torch.arange(5, 5 + num_tokens).repeat(3, 1)
    with torch.no_grad():
        with pool.mixing(pool.mix([route] * 3)):
            expected = layers.model(ids).logits
        with pool.mixing(pool.mix([Route(("huge",), (1.0,)), route, Route((), ())])):
            found = layers.model(ids).logits
    assert not found[0].isfinite().all()
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)
    assert found[2].isfinite().all()


def test_nothing_is_put_into_a_model_that_others_were_taken_out_of(
    model: PreTrainedModel, layers: FusedLayers
) -> None:
    pool, paged = Pool(layers), PagedPool(layers, max_mib=1)
    pool.add(made("one", 3))
    paged.add(made("one", 3))
    layers.unwrap()
    for late in (
        lambda: pool.add(made("two", 3)),
        lambda: paged.add(made("two", 3)),
        lambda: paged.row(Route(("one",), (1.0,))),
    ):
        with pytest.raises(RouterError, match="taken out of the model"):
            late()
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_layers_of_one_input_count_for_what_an_adapter_takes(layers: FusedLayers) -> None:
    layers.add(made("all", 2, layers=["self_attn.q_proj", "self_attn.v_proj"]))
    before = num_bytes(layers)
    adapters = [made(f"a{number}", 4) for number in range(40)]
    each = layers.num_bytes(adapters[0])
    assert each == 2 * 4 * (2 * 16 + 16 + 8) * 4
    residents = [layers.add(adapter) for adapter in adapters]
    assert 40 * each <= num_bytes(layers) <= 2 * (40 * each + before)
    assert len(residents) == 40


def test_the_hash_of_an_adapter_is_that_of_its_matrices_wherever_they_stand(
    layers: FusedLayers,
) -> None:
    first = layers.add(made("one", 3))
    layers.add(made("other", 2, layers=list(SIZES)))
    assert layers.add(made("one", 3)).sha256 == first.sha256
    assert layers.add(made("two", 3)).sha256 != first.sha256


@pytest.mark.parametrize("num_resident", [1, 2, 8])
def test_a_pool_larger_than_memory_answers_as_one_that_is_not(
    layers: FusedLayers, num_resident: int
) -> None:
    adapters = [made(f"a{number}", 4) for number in range(6)]
    each = layers.num_bytes(adapters[0])
    pool = PagedPool(layers, max_mib=num_resident * each / 2**20)
    for adapter in adapters:
        pool.add(adapter)
    assert pool.names == tuple(f"a{number}" for number in range(6))
    assert pool.resident == ()
    for name, other in zip(["a0", "a5", "a0", "a3"], ["a1", "a2", "a4", "a3"], strict=True):
        names = {name, other}
        own = [adapter for adapter in adapters if adapter.name in names]
        found = logits(pool, *(adapter.name for adapter in own))
        torch.testing.assert_close(found, alone(*own), atol=1e-5, rtol=1e-5)
        assert len(pool.resident) <= num_resident
    assert pool.resident[-1] == "a3"
    if num_resident == 2:
        assert pool.resident == ("a4", "a3")
        assert num_bytes(layers) <= 2 * 2 * each


def test_a_batch_runs_on_with_adapters_that_were_paged_out(layers: FusedLayers) -> None:
    adapters = [made(f"a{number}", 4) for number in range(3)]
    pool = PagedPool(layers, max_mib=1e-9)
    for adapter in adapters:
        pool.add(adapter)
    expected = logits(pool, "a0")
    mix = pool.mix([Route(("a0",), (1.0,))])
    logits(pool, "a1", "a2")
    assert pool.resident == ("a2",)
    with torch.no_grad(), pool.mixing(mix):
        torch.testing.assert_close(pool.layers.model(IDS).logits, expected)
    pool.add(made("a3", 4), replaces=False)
    pool.add(LoraAdapter("a0", adapters[1].pairs), replaces=True)
    torch.testing.assert_close(logits(pool, "a0"), logits(pool, "a1"))
    pool.remove("a1")
    with pytest.raises(RouterError, match="no adapter 'a1'; there are: a0, a2, a3"):
        pool.mix([Route(("a1",), (1.0,))])
    with pytest.raises(AdapterError, match="there is an adapter 'a2' already"):
        pool.add(adapters[2])
    with pytest.raises(GenerationError, match="adapter_mib is 0, expected more than 0"):
        PagedPool(layers, max_mib=0)


def test_an_adapter_that_still_runs_is_not_copied_again(layers: FusedLayers) -> None:
    adapters = [made(name, 4) for name in ("a", "b")]
    pool = PagedPool(layers, max_mib=1e-9)
    for adapter in adapters:
        pool.add(adapter)
    rows = [pool.row(Route((name,), (1.0,))) for name in "ab" * 8]
    assert len({id(one) for row in rows for one, _ in row}) == 2
    pool.add(LoraAdapter("a", made("c", 4).pairs), replaces=True)
    ((replaced, _),) = pool.row(Route(("a",), (1.0,)))
    assert all(one is not replaced for row in rows for one, _ in row)


def test_known_tokens_of_an_adapter_outlive_its_paging_and_not_its_replacement(
    layers: FusedLayers,
) -> None:
    pool = PagedPool(layers, max_mib=1e-9)
    for name in ("a", "b"):
        pool.add(made(name, 4))
    routes = {name: Route((name,), (1.0,)) for name in ("a", "b")}
    cache, ids = PrefixCache(1), list(range(20))
    cache.store(pool.row(routes["a"]), ids, ((torch.zeros(1, 20, 2), torch.zeros(1, 20, 2)),))
    pool.row(routes["b"])
    assert pool.resident == ("b",)
    assert cache.has(pool.row(routes["a"]), ids)
    assert not cache.has(pool.row(routes["b"]), ids)
    pool.add(made("a", 3), replaces=True)
    assert not cache.has(pool.row(routes["a"]), ids)


def test_threads_page_adapters_in_while_others_answer(layers: FusedLayers) -> None:
    adapters = [made(f"a{number}", 1 + number % 3) for number in range(8)]
    pool = PagedPool(layers, max_mib=2 * layers.num_bytes(adapters[2]) / 2**20)
    for adapter in adapters:
        pool.add(adapter)
    expected = {adapter.name: logits(pool, adapter.name) for adapter in adapters}
    wrong: list[str] = []

    def answer(start: int) -> None:
        for number in range(40):
            name = f"a{(start + 3 * number) % 8}"
            if not torch.allclose(logits(pool, name), expected[name], atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=answer, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False))
def test_a_batch_that_changes_answers_as_one_that_is_new(random: Random) -> None:
    """Prompts leave, join and change their adapters, while adapters leave and join the pool."""
    pool = Pool(FusedLayers(tiny_model()))
    names = [f"a{number}" for number in range(6)]
    paths = list(SIZES)
    for number, name in enumerate(names):
        pool.add(made(name, 1 + number, layers=paths[: 1 + number % 2]))

    def some(count: int) -> list[Row]:
        chosen = [random.sample(names, random.randint(0, 3)) for _ in range(count)]
        return [pool.row(Route(tuple(own), (0.5,) * len(own))) for own in chosen]

    mixes = [BatchMix(some(4))]
    for step in range(12):
        mix = random.choice(mixes)  # two go on from what both have picked
        rows = list(range(len(mix.rows)))
        change = random.choice(["keep", "join", "turn"])
        if change == "keep":
            mix = mix.select(random.choices(rows, k=random.randint(1, len(rows))))
        elif change == "join":
            mix = mix.with_rows([*mix.rows[:6], *some(random.randint(1, 2))])
        else:
            mix = mix.with_rows([*mix.rows[1:], *some(1)])
        mixes = [mixes[-1], mix]
        if step % 3 == 2:  # another adapter may get its rows, and layers their first adapter
            name = random.choice(names)
            pool.remove(name)
            gc.collect()
            pool.add(made(f"{name}{step}", 1 + step % 5, layers=paths))
            names[names.index(name)] = f"{name}{step}"
        for one in mixes:
            ids = torch.full((len(one.rows), random.choice([1, 1, 9])), 5)
            with torch.inference_mode(random.choice([True, False])), torch.no_grad():
                with pool.mixing(one):
                    found = pool.layers.model(ids).logits
                with pool.mixing(BatchMix(one.rows)):
                    expected = pool.layers.model(ids).logits
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
