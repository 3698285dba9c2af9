"""Fused layers put into a loaded model, and taken out again."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter
from dlplora.errors import AdapterError, RouterError
from dlplora.lora.fused import FusedLinear, LayerSums, Running
from dlplora.lora.layout import Pair, PairsByPath
from dlplora.lora.mix import BatchMix, Groups, OwnLayers, Row

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FusedLayers:
    """The linear layers of one model that adapters change, wrapped once for all of its pools.

    `groups` tells for each of them all that read the same input.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._fused: dict[str, FusedLinear] = {}
        self._running: Running = ContextVar("running", default=None)
        self.groups: Groups = {}
        self._changing = threading.RLock()
        self._is_unwrapped = False

    def mix(self, rows: Sequence[Row]) -> BatchMix:
        """Return the mix of a batch by what answers each of its prompts."""
        return BatchMix(rows, self.groups)

    @contextmanager
    def mixing(self, mix: LayerSums) -> Iterator[None]:
        """Run a batch in the `with` block by its mix.

        Raises `RouterError` once the layers are taken out of the model.
        """
        if self._is_unwrapped:
            raise RouterError("the adapters are taken out of the model, so nothing is answered")
        token = self._running.set(mix)
        try:
            yield
        finally:
            self._running.reset(token)

    def wrap(self, adapter: LoraAdapter) -> PairsByPath:
        """Wrap the layers that an adapter names, and return its pairs as batches use them.

        Raises `AdapterError` if the model has no such layer, or one of another shape; nothing is
        changed then.
        """
        with self._changing:
            pairs = self.lay_out(adapter)
            self._fuse(adapter.pairs)
            return pairs

    def wrap_own(self, own: OwnLayers) -> None:
        """Wrap the layers that others are to stand in for."""
        with self._changing:
            self._fuse(own)

    def lay_out(self, adapter: LoraAdapter) -> PairsByPath:
        """Return an adapter's pairs as batches use them; `AdapterError` if it does not fit."""
        return _lay_out(adapter, {path: self._layer(adapter, path) for path in adapter.pairs})

    def unwrap(self) -> None:
        """Put the model's own layers back in their places."""
        with self._changing:
            for path, layer in self._fused.items():
                set_module(self.model, path, layer.base)
            self._fused, self.groups = {}, {}
            self._is_unwrapped = True

    def _fuse(self, paths: Iterable[str]) -> None:
        """Wrap layers, and see which of all read one input; undone if the model fails at that."""
        before = self._fused
        layers = {path: self.model.get_submodule(path) for path in paths if path not in before}
        if not layers:
            return
        self._fused = dict(before)
        for path, layer in layers.items():
            self._fused[path] = FusedLinear(layer, path, self._running)
            set_module(self.model, path, self._fused[path])
        try:
            self.groups = self._grouped()
        except BaseException:
            for path, layer in layers.items():
                set_module(self.model, path, layer)
            self._fused = before
            raise

    @torch.no_grad()
    def _grouped(self) -> Groups:
        """Run the model on one token, to see which layers read the very same tensor."""
        watch = _Watch()
        ids = torch.zeros((1, 1), dtype=torch.long, device=next(self.model.parameters()).device)
        with self.mixing(watch):
            self.model(input_ids=ids, use_cache=False)
        groups: dict[str, tuple[str, ...]] = {path: (path,) for path in self._fused}
        for _, paths in watch.seen.values():
            groups.update(dict.fromkeys(paths, tuple(paths)))
        return groups

    def _layer(self, adapter: LoraAdapter, path: str) -> nn.Module:
        """Return the model's own layer at a path; `AdapterError` if the adapter does not fit."""
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
        sizes = in_out(layer)
        if sizes is None:
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
        pair = adapter.pairs[path]
        if (size := (pair.down_RI.shape[1], pair.up_OR.shape[0])) != sizes:
            raise AdapterError(
                f"adapter {adapter.name!r}: {path} maps {size[0]} to {size[1]}, "
                f"the base model's maps {sizes[0]} to {sizes[1]}"
            )
        return layer


class _Watch:
    """A mix that adds nothing, and sees which tensor each layer reads."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, list[str]]] = {}  # the paths of each tensor, by its id

    def add(self, path: str, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Leave the layer's output as it is."""
        self.seen.setdefault(id(x_BSI), (x_BSI, []))[1].append(path)
        return y_BSO


@contextmanager
def fused(model: nn.Module) -> Iterator[FusedLayers]:
    """Yield a model's fused layers, which are taken out of it at the end of the `with` block."""
    layers = FusedLayers(model)
    try:
        yield layers
    finally:
        layers.unwrap()


def _lay_out(adapter: LoraAdapter, layers: Mapping[str, nn.Module]) -> PairsByPath:
    """Put the matrices of an adapter where its layers are, and in their dtype."""
    return PairsByPath(
        (
            path,
            Pair(
                pair.down_RI.to(_weight(layers[path])),
                pair.up_OR.T.contiguous().to(_weight(layers[path])),
                len(pair.down_RI),
                pair.scaling,
            ),
        )
        for path, pair in adapter.pairs.items()
    )


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
