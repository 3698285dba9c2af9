"""Hooks of torch: who registers one expects that the module's own forward runs."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dlplora.patch import patched

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_global_hooks() -> bool:
    """Tell whether a hook is registered for all modules."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


def is_changed(module: nn.Module) -> bool:
    """Tell whether a module has hooks or a forward that is not its class's."""
    return "forward" in vars(module) or any(getattr(module, name) for name in _HOOKS)


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Let no hook of the model run in the block."""
    with ExitStack() as stack:
        for module in model.modules():
            for name in _HOOKS:
                stack.enter_context(patched(module, name, OrderedDict()))
        yield
