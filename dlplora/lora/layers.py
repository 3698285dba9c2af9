"""Fused layers put into a loaded model, and taken out again."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import AdapterError, RouterError
from dlplora.lora.fused import FusedLinear
from dlplora.lora.mix import BatchMix, OwnLayers
from dlplora.lora.stacks import Resident, Stack

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FusedLayers:
    """The linear layers of one model that adapters change, wrapped once for all of its pools."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._fused: dict[str, FusedLinear] = {}
        self._running: ContextVar[BatchMix | None] = ContextVar("running", default=None)
        self._stacks: dict[str, Stack] = {}  # of all linear layers, known with the first adapter
        self._changing = threading.RLock()
        self._is_unwrapped = False

    @contextmanager
    def mixing(self, mix: BatchMix) -> Iterator[None]:
        """Run a batch in the `with` block by its mix.

        Raises `RouterError` once the layers are taken out of the model.
        """
        self._check_wrapped()
        token = self._running.set(mix)
        try:
            yield
        finally:
            self._running.reset(token)

    def add(self, adapter: LoraAdapter, *, keeps_source: bool = False) -> Resident:
        """Copy an adapter into the stacks of its layers, which are wrapped; raises as `wrap`."""
        with self._changing:
            layers = self.wrap(adapter)
            resident = Resident(tuple(layers), adapter if keeps_source else None)
            same: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal rows are one object
            for stack, pairs, like in self._by_stack(adapter, layers):
                try:
                    rows = stack.add(pairs, like)
                    resident.rows[stack] = same.setdefault(rows, rows)
                except AdapterError as error:
                    raise AdapterError(f"adapter {adapter.name!r}: {error}") from None
            return resident

    def wrap(self, adapter: LoraAdapter) -> dict[str, nn.Module]:
        """Wrap the layers that an adapter changes, and return the original ones.

        Raises `AdapterError` if the model has no such layer, or one of another shape, and
        `RouterError` once the layers are taken out of the model; nothing is changed then.
        """
        with self._changing:
            self._check_wrapped()
            layers = {path: self._layer(adapter, path) for path in adapter.pairs}
            if not self._stacks:
                self._stacks = self._find_stacks()
            self._wrap(layers)
            return layers

    def wrap_own(self, own: OwnLayers) -> None:
        """Wrap the layers that others are to stand in for."""
        with self._changing:
            self._check_wrapped()
            self._wrap(own)

    def num_bytes(self, adapter: LoraAdapter) -> int:
        """Return what an adapter takes in its stacks; raises as `wrap`."""
        with self._changing:
            found = self._by_stack(adapter, self.wrap(adapter))
            return sum(stack.num_bytes(pairs, like) for stack, pairs, like in found)

    def unwrap(self) -> None:
        """Put the model's own layers back in their places."""
        with self._changing:
            for path, layer in self._fused.items():
                set_module(self.model, path, layer.base)
            self._fused, self._stacks = {}, {}
            self._is_unwrapped = True

    def _check_wrapped(self) -> None:
        if self._is_unwrapped:
            raise RouterError("the adapters are taken out of the model, so nothing is answered")

    def _by_stack(
        self, adapter: LoraAdapter, layers: Mapping[str, nn.Module]
    ) -> list[tuple[Stack, dict[str, LoraPair], Tensor]]:
        """Return each stack of an adapter's layers, its pairs there, and a weight of the layers."""
        found: dict[Stack, tuple[dict[str, LoraPair], Tensor]] = {}
        for path, layer in layers.items():
            stack = self._stacks.setdefault(path, Stack())
            self._fused[path].stack = stack
            found.setdefault(stack, ({}, _weight(layer)))[0][path] = adapter.pairs[path]
        return [(stack, *rest) for stack, rest in found.items()]

    def _wrap(self, paths: Iterable[str]) -> None:
        for path in paths:
            if path not in self._fused:
                layer = self.model.get_submodule(path)
                self._fused[path] = FusedLinear(layer, path, self._running)
                set_module(self.model, path, self._fused[path])

    @torch.no_grad()
    def _find_stacks(self) -> dict[str, Stack]:
        """Run the model on one token, to see which linear layers read the very same tensor."""
        inputs: list[Tensor] = []  # kept, so that each has an identity of its own
        stacks: dict[tuple[object, ...], Stack] = {}
        found: dict[str, Stack] = {}
        thread = threading.get_ident()

        def note(path: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            if given and threading.get_ident() == thread:
                inputs.append(given[0])
                weight = _weight(layer)
                kind = id(given[0]), weight.device, weight.dtype
                found[path] = stacks.setdefault(kind, Stack())

        hooks = [
            layer.register_forward_pre_hook(partial(note, path.removesuffix(".base")))
            for path, layer in self.model.named_modules()
            if in_out(layer)
        ]
        ids = torch.zeros((1, 1), dtype=torch.long, device=next(self.model.parameters()).device)
        try:
            self.model(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _layer(self, adapter: LoraAdapter, path: str) -> nn.Module:
        """Return the model's own layer at a path; `AdapterError` if the adapter does not fit."""
        is_known = path in self._fused and self._fused[path].stack is not None
        layer = self._fused[path].base if is_known else self._unknown_layer(adapter, path)
        pair, sizes = adapter.pairs[path], in_out(layer)
        assert sizes is not None
        if (size := (pair.down_RI.shape[1], pair.up_OR.shape[0])) != sizes:
            raise AdapterError(
                f"adapter {adapter.name!r}: {path} maps {size[0]} to {size[1]}, "
                f"the base model's maps {sizes[0]} to {sizes[1]}"
            )
        return layer

    def _unknown_layer(self, adapter: LoraAdapter, path: str) -> nn.Module:
        """Return a layer that no adapter changes yet; `AdapterError` if it cannot be fused."""
        try:
            layer = self.model.get_submodule(path)
        except AttributeError:
            raise AdapterError(
                f"adapter {adapter.name!r}: the base model has no layer {path}"
            ) from None
        if isinstance(layer, FusedLinear):
            if self._fused.get(path) is not layer:
                raise AdapterError(
                    f"adapter {adapter.name!r}: {path} is wrapped already by others; one model has "
                    f"one set of fused layers"
                )
            layer = layer.base
        if in_out(layer) is None:
            raise AdapterError(
                f"adapter {adapter.name!r}: {path} is no linear layer: {type(layer).__name__}"
            )
        if (dtype := _weight(layer).dtype) not in _DTYPES:
            raise AdapterError(
                f"adapter {adapter.name!r}: {path} holds {dtype}, which cannot be fused; "
                f"load the base model unquantised"
            )
        if layer is self.model.get_output_embeddings():  # type: ignore[operator]
            raise AdapterError(
                f"adapter {adapter.name!r}: {path} is the model's output head, which cannot be "
                f"fused; train it without"
            )
        return layer


@contextmanager
def fused(model: nn.Module) -> Iterator[FusedLayers]:
    """Yield a model's fused layers, which are taken out of it at the end of the `with` block."""
    layers = FusedLayers(model)
    try:
        yield layers
    finally:
        layers.unwrap()


def in_out(layer: nn.Module) -> tuple[int, int] | None:
    """Return the numbers of inputs and outputs of a linear layer, GPT-2's Conv1D included."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D" and isinstance(layer.weight, Tensor):
        return layer.weight.shape[0], layer.weight.shape[1]
    return None


def _weight(layer: nn.Module) -> Tensor:
    return next(layer.parameters())


def set_module(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer into a model's place of that path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
