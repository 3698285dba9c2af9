"""Fused layers put into a loaded model, and taken out again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter
from dlplora.errors import AdapterError, RouterError, choices
from dlplora.lora.fused import Mix, StackedLora
from dlplora.records.routes import Route


class Pool:
    """The adapters attached to one model, in the order of their columns in a mix."""

    def __init__(self, names: Sequence[str], mix: Mix, device: torch.device) -> None:
        self.names = tuple(names)
        self._column = {name: column for column, name in enumerate(self.names)}
        self._mix = mix
        self._device = device

    def weights(self, routes: Sequence[Route]) -> Tensor:
        """Lay out routes as weights (B, N); `RouterError` on an adapter that is not here."""
        weights_BN = torch.zeros(len(routes), len(self.names))
        for row, route in enumerate(routes):
            for name, weight in zip(route.adapters, route.weights, strict=True):
                if name not in self._column:
                    raise RouterError(f"no adapter {name!r}; there are: {choices(self.names)}")
                weights_BN[row, self._column[name]] = weight
        return weights_BN.to(self._device)

    @contextmanager
    def mixing(self, weights_BN: Tensor) -> Iterator[None]:
        """Run the batch in the `with` block by these weights."""
        with self._mix.using(weights_BN):
            yield


@contextmanager
def attached(model: nn.Module, adapters: Sequence[LoraAdapter]) -> Iterator[Pool]:
    """Attach adapters to whatever linear layers they name, for the time of a `with` block.

    The model's own layers are wrapped, not changed, and stand in their places again afterwards.
    Raises `AdapterError` if the model has no such layer or one of another shape.
    """
    mix = Mix()
    paths = sorted({path for adapter in adapters for path in adapter.pairs})
    fused = {path: _fused_layer(model, path, adapters, mix) for path in paths}
    device = next(model.parameters()).device
    try:
        for path, layer in fused.items():
            _set_module(model, path, layer)
        yield Pool([adapter.name for adapter in adapters], mix, device)
    finally:
        for path, layer in fused.items():
            _set_module(model, path, layer.base)


def _fused_layer(
    model: nn.Module, path: str, adapters: Sequence[LoraAdapter], mix: Mix
) -> StackedLora:
    owner = next(adapter.name for adapter in adapters if path in adapter.pairs)
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise AdapterError(f"adapter {owner!r}: the base model has no layer {path}") from None
    sizes = _in_out(layer)
    if sizes is None:
        raise AdapterError(f"adapter {owner!r}: {path} is no linear layer: {type(layer).__name__}")
    for adapter in adapters:
        pair = adapter.pairs.get(path)
        if pair and (found := (pair.down_RI.shape[1], pair.up_OR.shape[0])) != sizes:
            raise AdapterError(
                f"adapter {adapter.name!r}: {path} maps {found[0]} to {found[1]}, "
                f"the base model's maps {sizes[0]} to {sizes[1]}"
            )
    return StackedLora(layer, [adapter.pairs.get(path) for adapter in adapters], mix)


def _in_out(layer: nn.Module) -> tuple[int, int] | None:
    """Return the numbers of inputs and outputs of a linear layer, GPT-2's Conv1D included."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D" and isinstance(layer.weight, Tensor):
        return layer.weight.shape[0], layer.weight.shape[1]
    return None


def _set_module(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)
