"""Adapters attached to a loaded model, by name."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import (
    AdapterError,
    ParamsError,
    RouterError,
    UnknownAdapterError,
    choices,
    one_line,
)
from dlplora.lora.layers import FusedLayers, fused, in_out
from dlplora.lora.mix import BatchMix, Row
from dlplora.records.routes import Route

T = TypeVar("T")


class Pool:
    """Adapters by name, which come and go while batches run.

    A batch keeps the adapters that it began with, also when they are removed or replaced
    meanwhile. Several pools may share the layers of one model; names are each pool's own.
    """

    def __init__(self, layers: FusedLayers) -> None:
        self.layers = layers
        self._adapters: dict[str, Any] = {}  # what `_keep` returns of each
        self._changing = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that routes may name."""
        return tuple(self._adapters)

    def add(self, adapter: LoraAdapter, *, replaces: bool = False) -> None:
        """Attach an adapter to whatever linear layers it names.

        Raises `AdapterError` if one of its name is here that it does not replace, or if it does not
        fit the model; nothing is changed then.
        """
        with self._changing:
            if adapter.name in self._adapters and not replaces:
                raise AdapterError(f"there is an adapter {adapter.name!r} already")
            kept = self._keep(adapter)
            self._forget(adapter.name)
            self._adapters = {**self._adapters, adapter.name: kept}

    def remove(self, name: str) -> None:
        """Let go of an adapter; batches that run with it end with it."""
        with self._changing:
            found(self._adapters, name)
            self._forget(name)
            self._adapters = {k: v for k, v in self._adapters.items() if k != name}

    def _keep(self, adapter: LoraAdapter) -> Any:
        """Take in an adapter that joins; `AdapterError` if it does not fit the model."""
        return self.layers.add(adapter)

    def _forget(self, name: str) -> None:
        """Let go of what else is kept of an adapter that leaves or is replaced."""

    def row(self, route: Route) -> Row:
        """Take the adapters of a route as they are now; `RouterError` on one that is not here."""
        refuse_per_token(route)
        adapters = self._adapters
        return tuple((found(adapters, name), weight) for name, weight in route.mix)

    def mix(self, routes: Sequence[Route]) -> BatchMix:
        """Return the mix of a batch by its routes; `RouterError` on an adapter that is not here."""
        return BatchMix([self.row(route) for route in routes])

    def mixing(self, mix: BatchMix) -> AbstractContextManager[None]:
        """Run a batch in the `with` block by its mix."""
        return self.layers.mixing(mix)


@contextmanager
def attached(
    model: nn.Module, adapters: Sequence[LoraAdapter], *, pool_type: type[Pool] = Pool
) -> Iterator[Pool]:
    """Attach adapters to a model for the time of a `with` block."""
    with fused(model) as layers:
        pool = pool_type(layers)
        for adapter in adapters:
            pool.add(adapter)
        yield pool


def refuse_per_token(route: Route) -> None:
    """Raise `RouterError` on a route that leaves the weights to layers."""
    if route.per_token:
        raise RouterError("no layers here weigh adapters for each token, as the route says")


def found(adapters: Mapping[str, T], name: str) -> T:
    """Return an adapter; `UnknownAdapterError` says which there are."""
    if name not in adapters:
        raise UnknownAdapterError(f"no adapter {name!r}; there are: {choices(adapters)}")
    return adapters[name]


def target_paths(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the paths of a model's modules that end with a name, as PEFT finds them.

    Raises `ParamsError` on a name that no module has; it says which linear layers there are.
    """
    modules = dict(model.named_modules())
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in modules):
            head = model.get_output_embeddings()  # type: ignore[operator]
            linear = {
                path.rpartition(".")[2]
                for path, module in modules.items()
                if in_out(module) and module is not head
            }
            raise ParamsError(
                f"params.yaml: adapter.target_modules: the base model has no layer {name}; its "
                f"linear layers are: {choices(linear)}"
            )
    return [p for p in modules if any(f".{p}".endswith(f".{name}") for name in names)]


@torch.no_grad()
def check_fusable(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise `ParamsError` if layers that adapters are to change cannot be fused.

    Adapters that change nothing are attached to them, and two short rows read.
    """
    try:
        pairs = {path: _no_change(model.get_submodule(path), path) for path in paths}
        with attached(model, [LoraAdapter("", pairs)]) as pool:
            route = Route(("",), (1.0,))
            ids = torch.zeros((2, 3), dtype=torch.long, device=next(model.parameters()).device)
            with pool.mixing(pool.mix([route, route])):
                model(input_ids=ids, use_cache=False)
    except Exception as error:  # a model's own code, too, asks layers for what they lack
        if isinstance(error, torch.OutOfMemoryError):
            raise
        told = str(error).removeprefix("adapter '': ") if isinstance(error, AdapterError) else None
        raise ParamsError(
            f"params.yaml: adapter.target_modules: {told or one_line(error)}; name other layers"
        ) from error


def _no_change(layer: nn.Module, path: str) -> LoraPair:
    sizes = in_out(layer)
    if sizes is None:
        raise AdapterError(f"{path} is no linear layer: {type(layer).__name__}")
    return LoraPair(torch.zeros(1, sizes[0]), torch.zeros(sizes[1], 1), 1.0)
