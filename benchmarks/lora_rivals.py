"""Ways to give every prompt its own mix of adapters: ours, PEFT's, a loop and an einsum.

Shapes: B prompts, S tokens, I inputs, O outputs, N adapters, R ranks.
"""

import copy
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.engine.batch import Batch
from dlplora.engine.reading import prefill
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.models import Base
from dlplora.records.routes import BASE_ROUTE, Route

NUM_ADAPTERS, RANK, ALPHA, PER_PROMPT = 26, 8, 16, 3
TARGETS = ("q_proj", "v_proj")
SINGLES = ("peft_single_float32", "peft_single")


@dataclass(frozen=True)
class Rival:
    """A way to answer: a model for `Batch`, its pool, and the routes of its prompts."""

    base: Base
    pool: Pool
    routes: tuple[Route, ...]

    def read(self, ids: Tensor) -> Batch:
        """Read prompts (B, S)."""
        return prefill(self.base, self.pool, ids.tolist(), self.routes[: len(ids)])


def adapter_of(base: Base, number: int, *, rank: int = RANK) -> LoraAdapter:
    """Make a seeded adapter."""
    generator = torch.Generator().manual_seed(number)
    pairs = {}
    for path, layer in base.model.named_modules():
        if path.endswith(TARGETS):
            weight = next(layer.parameters())
            outputs, inputs = weight.shape
            down = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            up = torch.randn(outputs, rank, generator=generator) * 0.01
            pairs[path] = LoraPair(down, up, ALPHA / rank)
    return LoraAdapter(f"a{number}", pairs)


def some_routes(num_adapters: int, count: int) -> tuple[Route, ...]:
    """Draw routes of three adapters each, with weights that sum to 1."""
    rng = random.Random(num_adapters)
    routes = []
    for _ in range(count):
        names = rng.sample(range(num_adapters), PER_PROMPT)
        parts = [rng.randint(1, 9) for _ in names]
        weights = tuple(part / sum(parts) for part in parts)
        routes.append(Route(tuple(f"a{name}" for name in names), weights))
    return tuple(routes)


def pool_of(model: nn.Module, adapters: Sequence[LoraAdapter]) -> Pool:
    """Attach adapters for good."""
    pool = Pool(FusedLayers(model))
    for adapter in adapters:
        pool.add(adapter)
    return pool


def peft_of(base: Base, adapters: Sequence[LoraAdapter], *, float32: bool) -> Any:
    """Give a copy of the model the same adapters by PEFT."""
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    names = [adapter.name for adapter in adapters]
    model: Any = get_peft_model(
        copy.deepcopy(base.model), config, adapter_name=names[0], autocast_adapter_dtype=float32
    )
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=float32)
    for adapter in adapters:
        for path, pair in adapter.pairs.items():
            layer = model.base_model.model.get_submodule(path)
            layer.lora_A[adapter.name].weight.data.copy_(pair.down_RI)
            layer.lora_B[adapter.name].weight.data.copy_(pair.up_OR)
    model.set_adapter(names[0])
    return model.eval().requires_grad_(False)


class NamedAdapters(nn.Module):
    """PEFT's mixed batches: each sample by the one adapter of its name."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        return self.model(input_ids=input_ids, adapter_names=self.names[: len(input_ids)], **more)


class LoopedSum(nn.Module):
    """A frozen layer that goes through the adapters in use one by one."""

    def __init__(self, base: nn.Module, pairs: Sequence[LoraPair], weights_BN: Tensor) -> None:
        super().__init__()
        self.base = base
        weight = next(base.parameters())
        self.pairs = [(pair.down_RI.to(weight), pair.up_OR.to(weight)) for pair in pairs]
        self.weights_BN = (weights_BN * pairs[0].scaling).to(weight)

    def forward(self, x_BSI: Tensor) -> Tensor:
        y_BSO: Tensor = self.base(x_BSI)
        for number, (down_RI, up_OR) in enumerate(self.pairs):
            mix_B11 = self.weights_BN[: len(x_BSI), number, None, None]
            y_BSO = y_BSO + mix_B11 * (x_BSI @ down_RI.T @ up_OR.T)
        return y_BSO


class EinsumSum(nn.Module):
    """LoraRetriever's batch inference (arXiv 2402.09997): every adapter's output, then the sum."""

    def __init__(self, base: nn.Module, pairs: Sequence[LoraPair], weights_BN: Tensor) -> None:
        super().__init__()
        self.base = base
        weight = next(base.parameters())
        self.down_NRI = torch.stack([pair.down_RI for pair in pairs]).to(weight)
        self.up_NOR = torch.stack([pair.up_OR for pair in pairs]).to(weight)
        self.weights_BN = (weights_BN * pairs[0].scaling).to(weight)

    def forward(self, x_BSI: Tensor) -> Tensor:
        hidden_BSNR = torch.einsum("bsi,nri->bsnr", x_BSI, self.down_NRI)
        each_BSNO = torch.einsum("bsnr,nor->bsno", hidden_BSNR, self.up_NOR)
        mix_BN = self.weights_BN[: len(x_BSI)]
        sum_BSO: Tensor = self.base(x_BSI) + torch.einsum("bsno,bn->bso", each_BSNO, mix_BN)
        return sum_BSO


def with_layers(
    base: Base, kind: type[nn.Module], adapters: Sequence[LoraAdapter], routes: Sequence[Route]
) -> Base:
    """Copy the model and replace its target layers; only the adapters in use are given."""
    used = [a for a in adapters if any(a.name in route.adapters for route in routes)]
    weights_BN = torch.zeros(len(routes), len(used))
    for row, route in enumerate(routes):
        for name, weight in route.mix:
            weights_BN[row, [a.name for a in used].index(name)] = weight
    model = copy.deepcopy(base.model)
    for path in used[0].pairs:
        parent, _, name = path.rpartition(".")
        layer = model.get_submodule(path)
        made = kind(layer, [a.pairs[path] for a in used], weights_BN)
        setattr(model.get_submodule(parent), name, made)
    return replace(base, model=model)


def rivals_of(base: Base, num_prompts: int) -> tuple[dict[str, Rival], float]:
    """Build every rival for so many prompts; also return the seconds of PEFT's merges."""
    adapters = [adapter_of(base, number) for number in range(NUM_ADAPTERS)]
    routes = some_routes(NUM_ADAPTERS, num_prompts)
    no_routes = (BASE_ROUTE,) * num_prompts
    empty = Pool(FusedLayers(base.model))
    fused_model = replace(base, model=copy.deepcopy(base.model))
    fused = Rival(fused_model, pool_of(fused_model.model, adapters), routes)
    firsts = [route.adapters[0] for route in routes]
    one = adapters[:1]

    def plain(model: Any) -> Rival:
        return Rival(replace(base, model=model), empty, no_routes)

    named: dict[str, Rival] = {}
    build_seconds = 0.0
    for suffix, float32 in (("", False), ("_float32", True)):
        mixed = peft_of(base, adapters, float32=float32)
        named[f"peft_mixed_batch{suffix}"] = plain(NamedAdapters(mixed, firsts))
        merged = peft_of(base, adapters, float32=float32)
        start = time.perf_counter()
        for number, route in enumerate(routes):
            merged.add_weighted_adapter(
                list(route.adapters), list(route.weights), f"route{number}", combination_type="cat"
            )
        build_seconds = time.perf_counter() - start
        merged.requires_grad_(False)
        names = [f"route{number}" for number in range(num_prompts)]
        named[f"peft_cat{suffix}"] = plain(NamedAdapters(merged, names))

    return {
        "base": plain(copy.deepcopy(base.model)),
        "peft_single": plain(peft_of(base, one, float32=False)),
        "peft_single_float32": plain(peft_of(base, one, float32=True)),
        "fused": fused,
        **named,
        "loop": Rival(with_layers(base, LoopedSum, adapters, routes), empty, no_routes),
        "einsum": Rival(with_layers(base, EinsumSum, adapters, routes), empty, no_routes),
    }, build_seconds
