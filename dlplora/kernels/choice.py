"""Which kernels a model trains by: detected once, patched in a block, undone at its end.

A *kernel* computes what a layer of the model computes, in fewer passes over memory and with its own
gradient; its file holds the plain `reference` beside it. What no kernel knows computes by the
model's and PEFT's own forward.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from dlplora.kernels import gated_mlp, lora_linear, packed_attention, rms_norm, rotary
from dlplora.kernels.definitions import defining_modules
from dlplora.patch import patched
from dlplora.words import Kernels

logger = logging.getLogger(__name__)
Kernel = Literal[
    "cross_entropy", "gated_mlp", "lora_linear", "packed_attention", "rms_norm", "rotary"
]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _LayerKernel(Protocol):
    """What a file of a kernel for whole layers offers."""

    def is_candidate(self, module: nn.Module, /) -> bool: ...
    def matches(self, module: nn.Module, /) -> bool: ...
    def fast_forward(self, module: nn.Module, /) -> Callable[[Tensor], Tensor]: ...


_OF_LAYERS: dict[Kernel, _LayerKernel] = {
    "gated_mlp": gated_mlp,
    "lora_linear": lora_linear,
    "rms_norm": rms_norm,
}


@contextmanager
def use_kernels(model: nn.Module, kernels: Kernels) -> Iterator[tuple[Kernel, ...]]:
    """Let a model, with an adapter of PEFT or without, compute by kernels in the block.

    Yields the names of the kernels that run, for `mean_loss` and for training.json: with
    "reference" none. One warning names what the model computes by reference all the same.
    """
    if kernels == "reference":
        yield ()
        return
    ran: set[Kernel] = {"cross_entropy"}
    fell_back: dict[Kernel, set[str]] = defaultdict(set)
    with ExitStack() as stack:
        for module in model.modules():
            for name, kernel in _OF_LAYERS.items():
                if kernel.is_candidate(module):
                    if "forward" not in vars(module) and kernel.matches(module):
                        stack.enter_context(patched(module, "forward", _forward(kernel, module)))
                        ran.add(name)
                    else:
                        fell_back[name].add(type(module).__name__)
        for home in defining_modules(model, rotary.NAME):
            if rotary.matches(home):
                function = rotary.fast_function(home)
                stack.enter_context(patched(home, rotary.NAME, function))
                ran.add("rotary")
            else:
                fell_back["rotary"].add(home.__name__.rpartition(".")[2])
        # On other devices the model's own fused attention is the faster, and scores are too large.
        if next(model.parameters()).device.type == "cpu":
            if _lets_packs_in(model, stack):
                ran.add("packed_attention")
            else:
                fell_back["packed_attention"].add("own attention")
        _warn(model, fell_back)
        yield tuple(sorted(ran))


def _forward(kernel: _LayerKernel, module: nn.Module) -> Callable[..., Any]:
    """Return a forward by a kernel; by the module's own where a hook waits for a layer in it."""
    own, fast = module.forward, kernel.fast_forward(module)
    inner = [part for part in module.modules() if part is not module]

    def forward(*given: Any, **named: Any) -> Any:
        if named or len(given) != 1 or any(map(_has_hooks, inner)):
            return own(*given, **named)
        return fast(*given)

    return forward


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def _lets_packs_in(model: nn.Module, stack: ExitStack) -> bool:
    """Let a model take packs until the stack is closed, if it can; tell whether it does."""
    name = packed_attention.NAME
    with ExitStack() as tried:
        for home in defining_modules(model, name):
            interface = packed_attention.PackedInterface(getattr(home, name))
            tried.enter_context(patched(home, name, interface))
        if not packed_attention.takes_packs(model):
            return False
        stack.enter_context(tried.pop_all())
    return True


def _warn(model: nn.Module, fell_back: dict[Kernel, set[str]]) -> None:
    if fell_back:
        told = [f"{name} ({', '.join(sorted(of))})" for name, of in sorted(fell_back.items())]
        title = type(packed_attention.inner_model(model)).__name__
        logger.warning("%s: no kernel, so slower training, for %s", title, "; ".join(told))
