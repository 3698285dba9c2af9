"""Which kernels a model trains by: detected once, patched in a block, undone at its end.

A *kernel* computes what a layer of the model computes, in fewer passes over memory and with its own
gradient; its file holds the plain `reference` beside it. Other layers run their own forward.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol, get_args

from torch import Tensor, nn

from dlplora.errors import TrainingError
from dlplora.kernels import gated_mlp, lora_linear, packed_attention, rms_norm, rotary
from dlplora.kernels.definitions import defining_modules
from dlplora.kernels.hooks import has_global_hooks, is_changed
from dlplora.models import inner_model
from dlplora.patch import patched
from dlplora.words import KernelChoice

logger = logging.getLogger(__name__)
Kernel = Literal[
    "cross_entropy", "gated_mlp", "lora_linear", "packed_attention", "rms_norm", "rotary"
]


class _LayerKernel(Protocol):
    """What a file of a kernel for whole layers offers.

    `matches` decides once for a layer, `suits` at each call; `fast_forward` computes a call.
    """

    def is_candidate(self, module: nn.Module, /) -> bool: ...
    def matches(self, module: nn.Module, /) -> bool: ...
    def suits(self, module: nn.Module, x: Tensor, /) -> bool: ...
    def fast_forward(self, module: nn.Module, x: Tensor, /) -> Tensor: ...


_OF_LAYERS: dict[Kernel, _LayerKernel] = {
    "gated_mlp": gated_mlp,
    "lora_linear": lora_linear,
    "rms_norm": rms_norm,
}
_lock = threading.Lock()


@contextmanager
def use_kernels(model: nn.Module, kernels: KernelChoice) -> Iterator[tuple[Kernel, ...]]:
    """Let a model, with an adapter of PEFT or without, compute by kernels in the block.

    Yields the names of the kernels that at least one layer uses, for `mean_loss` and for
    training.json: with "reference" none. Logs one warning that names layers without a kernel.
    Raises `TrainingError` inside or beside another block: a process has one, since functions of
    transformers are patched for all models.
    """
    if kernels == "reference":
        yield ()
        return
    if not _lock.acquire(blocking=False):
        raise TrainingError(
            "kernels: this process already trains by kernels; "
            "train one model at a time, or set runtime.kernels to reference"
        )
    try:
        with ExitStack() as stack:
            ran, fell_back = _patch(model, stack)
            _warn(model, fell_back)
            yield tuple(sorted(ran))
    finally:
        _lock.release()


def _patch(model: nn.Module, stack: ExitStack) -> tuple[set[Kernel], dict[Kernel, set[str]]]:
    """Patch a model until the stack is closed; return the kernels in use, and what lacks which."""
    ran: set[Kernel] = {"cross_entropy"}
    fell_back: dict[Kernel, set[str]] = defaultdict(set)
    expected = set[Kernel](get_args(Kernel))
    for module in model.modules():
        for name, kernel in _OF_LAYERS.items():
            if kernel.is_candidate(module):
                if any(map(lora_linear.is_candidate, module.children())):
                    expected.discard(name)  # its parts carry the adapters, and have a kernel each
                elif "forward" not in vars(module) and kernel.matches(module):
                    stack.enter_context(patched(module, "forward", _forward(kernel, module)))
                    ran.add(name)
                else:
                    fell_back[name].add(_description(module))
    for home in defining_modules(model, rotary.NAME):
        if rotary.matches(home) and not rotary.rotates_parts(home, _text_config(model)):
            function = rotary.fast_function(home)
            stack.enter_context(patched(home, rotary.NAME, function))
            ran.add("rotary")
        else:
            fell_back["rotary"].add(home.__name__.rpartition(".")[2])
    # On other devices the model's own fused attention is the faster, and scores are too large.
    if next(model.parameters()).device.type != "cpu":
        expected.discard("packed_attention")
    elif _patch_attention(model, stack):
        ran.add("packed_attention")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        expected.discard("lora_linear")
    for name in expected - ran:
        fell_back.setdefault(name, set())
    return ran, fell_back


def _text_config(model: nn.Module) -> Any:
    return inner_model(model).config.get_text_config(decoder=True)


def _description(module: nn.Module) -> str:
    """Return the class of a layer without a kernel, or what its adapter has besides a pair."""
    found = lora_linear.mismatch(module) if lora_linear.is_candidate(module) else None
    return found or type(module).__name__


def _forward(kernel: _LayerKernel, module: nn.Module) -> Callable[..., Any]:
    """Return a forward by a kernel, which falls back to the module's own where they may differ.

    That is so if a submodule has hooks or another forward, and while there are global hooks.
    """
    own = module.forward
    inner = [part for part in module.modules() if part is not module]

    def forward(*given: Any, **named: Any) -> Any:
        if (
            named
            or len(given) != 1
            or not kernel.suits(module, *given)
            or has_global_hooks()
            or any(map(is_changed, inner))
        ):
            return own(*given, **named)
        return kernel.fast_forward(module, *given)

    return forward


def _patch_attention(model: nn.Module, stack: ExitStack) -> bool:
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
        listed = [
            f"{name} ({', '.join(sorted(of))})" if of else name
            for name, of in sorted(fell_back.items())
        ]
        title = type(inner_model(model)).__name__
        logger.warning("%s trains more slowly: no kernel for %s", title, "; ".join(listed))
