"""A device that is not there: operations are checked and counted, and nothing is computed."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META, HOST = torch.device("meta"), torch.device("cpu")
_ATEN = torch.ops.aten
_COPY, _COPY_INTO = _ATEN._to_copy.default, _ATEN.copy_.default
_SCALAR = _ATEN._local_scalar_dense.default
_DEPENDS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_INDEXED = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}


class MixedDevicesError(Exception):
    """An operation got tensors of two devices."""


class HostReadError(Exception):
    """The host waited for the device within a forward pass, or for values where it never may."""


class Dispatch(TorchDispatchMode):
    """Lets a device of no values, `meta`, behave as a GPU would.

    Refuses an operation whose tensors, those without dimensions apart, lie on two devices. Counts
    what the host reads in `reads` and answers with zeros; within a forward pass of the model it
    refuses that and copies to the device that the host would wait for, and everywhere an operation
    that would wait for values by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.num_operations = 0  # on the device
        self.is_in_model = False

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [one for one in leaves if isinstance(one, Tensor)]
        named = [one for one in leaves if isinstance(one, torch.device)]
        if META not in [*named, *(one.device for one in tensors)]:
            return operation(*args, **kwargs)
        with self:  # in inference mode operations that consist of others come whole
            found = operation.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        is_from_host = operation is _COPY and tensors[0].device == HOST
        if is_from_host and not kwargs.get("non_blocking"):
            self._wait(operation)
        self.num_operations += 1
        if operation is _SCALAR:
            return self._read(operation, tensors[0]).item()
        if operation is _COPY and kwargs.get("device") == HOST:
            return self._read(operation, tensors[0]).to(kwargs.get("dtype") or tensors[0].dtype)
        if operation is _COPY_INTO and args[0].device == HOST:
            return args[0].copy_(self._read(operation, args[1]))
        devices = {one.device.type for one in tensors if one.dim()}
        if len(devices) > 1 and operation is not _COPY_INTO:
            raise MixedDevicesError(f"{operation}: tensors on {sorted(devices)}")
        is_by_values = bool(_DEPENDS & set(operation.tags))
        if operation in _INDEXED:
            is_by_values = any(one is not None and one.dtype == torch.bool for one in args[1])
        if is_by_values:
            raise HostReadError(f"{operation}: what it returns depends on values")
        return operation(*args, **kwargs)

    def _wait(self, operation: Any) -> None:
        if self.is_in_model:
            raise HostReadError(f"{operation}: the host waits in a forward pass")

    def _read(self, operation: Any, tensor: Tensor) -> Tensor:
        self._wait(operation)
        self.reads += 1
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


@contextmanager
def dispatched(model: nn.Module) -> Iterator[Dispatch]:
    """Check all that runs in the block, and most strictly what runs in the model's forward."""
    mode = Dispatch()

    def enter(*_: object) -> None:
        mode.is_in_model = True

    def leave(*_: object) -> None:
        mode.is_in_model = False

    hooks = [
        model.register_forward_pre_hook(enter),
        model.register_forward_hook(leave, always_call=True),
    ]
    try:
        with mode:
            yield mode
    finally:
        for hook in hooks:
            hook.remove()
