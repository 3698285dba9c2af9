"""What the classes and functions of a model family compute, found out once per model."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def defining_modules(model: nn.Module, name: str) -> list[ModuleType]:
    """Return the Python modules that define a model's layers and have a global of this name."""
    names = sorted({type(module).__module__ for module in model.modules()})
    return [sys.modules[one] for one in names if hasattr(sys.modules[one], name)]


def computes(
    module: nn.Module, x: Tensor, *, expected: Tensor, **attributes: Callable[..., Tensor] | Any
) -> bool:
    """Tell whether the forward of a module's class maps `x` to `expected`.

    The forward gets these attributes and no others: what asks for anything else – whether it
    trains, a limit, or even an attribute with a default – fails. It runs on `x` alone, so the
    module itself may be on any device.
    """
    stub = _Stub(**attributes)
    try:
        with torch.no_grad():
            found = type(module).forward(stub, x)
    except Exception:  # it needs more than these attributes
        return False
    return not stub.missed and isinstance(found, Tensor) and same(found, expected)


class _Stub(SimpleNamespace):
    """A few attributes; notes in `missed` whether others were asked for."""

    missed = False

    def __getattr__(self, name: str) -> Any:
        self.missed = True
        raise AttributeError(name)


def same(found: Tensor, expected: Tensor) -> bool:
    """Tell whether two float32 tensors are equal but for rounding."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
