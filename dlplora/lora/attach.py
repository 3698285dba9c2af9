"""Fused layers put into a loaded model, and taken out again."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import AdapterError, ParamsError, RouterError, choices, one_line
from dlplora.lora.fused import FusedLinear, LayerSums, Running
from dlplora.lora.layout import Pair, PairsByPath
from dlplora.lora.mix import BatchMix, Groups, Row
from dlplora.records.routes import Route

T = TypeVar("T")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Pool:
    """The adapters of one model, by name; they come and go while batches run.

    The model's own layers are wrapped, not changed. A batch keeps the adapters that it began
    with, also when they are removed or replaced meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._adapters: dict[str, PairsByPath] = {}
        self._fused: dict[str, FusedLinear] = {}
        self._running: Running = ContextVar("running", default=None)
        self._groups: Groups = {}
        self._changing = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that routes may name."""
        return tuple(self._adapters)

    def add(self, adapter: LoraAdapter) -> None:
        """Attach an adapter to whatever linear layers it names.

        Raises `AdapterError` if one of its name is here, or if the model has no such layer, or
        one of another shape; nothing is changed then.
        """
        with self._changing:
            if adapter.name in self._adapters:
                raise AdapterError(f"there is an adapter {adapter.name!r} already")
            layers = {path: self._layer(adapter, path) for path in adapter.pairs}
            pairs = _lay_out(adapter, layers)
            if new := layers.keys() - self._fused.keys():
                self._fuse({path: layers[path] for path in new})
            self._adapters = {**self._adapters, adapter.name: pairs}

    def lay_out(self, adapter: LoraAdapter) -> PairsByPath:
        """Return an adapter's pairs as batches use them; `AdapterError` if it does not fit."""
        return _lay_out(adapter, {path: self._layer(adapter, path) for path in adapter.pairs})

    def remove(self, name: str) -> None:
        """Let go of an adapter; batches that run with it end with it."""
        with self._changing:
            found(self._adapters, name)
            self._adapters = {k: v for k, v in self._adapters.items() if k != name}

    def row(self, route: Route) -> Row:
        """Take the adapters of a route as they are now; `RouterError` on one that is not here."""
        adapters = self._adapters
        return tuple((found(adapters, name), weight) for name, weight in route.mix)

    def mix(self, routes: Sequence[Route]) -> BatchMix:
        """Return the mix of a batch by its routes; `RouterError` on an adapter that is not here."""
        return self.mix_rows([self.row(route) for route in routes])

    def mix_rows(self, rows: Sequence[Row]) -> BatchMix:
        """Return the mix of prompts whose adapters were taken before."""
        return BatchMix(rows, self._groups)

    @contextmanager
    def mixing(self, mix: LayerSums) -> Iterator[None]:
        """Run a batch in the `with` block by its mix."""
        token = self._running.set(mix)
        try:
            yield
        finally:
            self._running.reset(token)

    def detach(self) -> None:
        """Put the model's own layers back in their places."""
        with self._changing:
            for path, layer in self._fused.items():
                set_module(self._model, path, layer.base)
            self._fused, self._adapters, self._groups = {}, {}, {}

    def _fuse(self, layers: Mapping[str, nn.Module]) -> None:
        """Wrap layers, and see which of all read one input; undone if the model fails at that."""
        before = self._fused
        self._fused = dict(before)
        for path, layer in layers.items():
            self._fused[path] = FusedLinear(layer, path, self._running)
            set_module(self._model, path, self._fused[path])
        try:
            self._groups = self._grouped()
        except BaseException:
            for path, layer in layers.items():
                set_module(self._model, path, layer)
            self._fused = before
            raise

    @torch.no_grad()
    def _grouped(self) -> Groups:
        """Run the model on one token, to see which layers read the very same tensor."""
        watch = _Watch()
        ids = torch.zeros((1, 1), dtype=torch.long, device=next(self._model.parameters()).device)
        with self.mixing(watch):
            self._model(input_ids=ids, use_cache=False)
        groups: dict[str, tuple[str, ...]] = {path: (path,) for path in self._fused}
        for _, paths in watch.seen.values():
            groups.update(dict.fromkeys(paths, tuple(paths)))
        return groups

    def _layer(self, adapter: LoraAdapter, path: str) -> nn.Module:
        """Return the model's own layer at a path; `AdapterError` if the adapter does not fit."""
        try:
            layer = self._model.get_submodule(path)
        except AttributeError:
            raise AdapterError(
                f"adapter {adapter.name!r}: the base model has no layer {path}"
            ) from None
        if isinstance(layer, FusedLinear):
            if self._fused.get(path) is not layer:
                raise AdapterError(
                    f"adapter {adapter.name!r}: {path} belongs to another pool of the same model; "
                    f"add it to that one"
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
        if layer is self._model.get_output_embeddings():  # type: ignore[operator]
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
def attached(
    model: nn.Module, adapters: Sequence[LoraAdapter], *, pool_type: type[Pool] = Pool
) -> Iterator[Pool]:
    """Attach adapters to a model for the time of a `with` block."""
    pool = pool_type(model)
    try:
        for adapter in adapters:
            pool.add(adapter)
        yield pool
    finally:
        pool.detach()


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


def found(adapters: Mapping[str, T], name: str) -> T:
    """Return an adapter; `RouterError` says which there are."""
    if name not in adapters:
        raise RouterError(f"no adapter {name!r}; there are: {choices(adapters)}")
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
