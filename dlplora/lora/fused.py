"""Many LoRA adapters on one linear layer, each prompt with its own mix of them.

    y_b = W0 x_b + Σ_i w_bi s_i B_i A_i x_b

Three exact forms of the sum, each a few matrix products whatever the number of adapters:

- shared: all prompts have the same mix; the weights are folded into B.
- stacked: the pairs of all adapters that any prompt uses lie side by side as one of rank P; the
  weights scale its columns, prompt by prompt.
- gathered: each prompt has only its own pairs, as one batched product.

Shapes: B prompts, S tokens, I inputs, O outputs, P summed ranks, K largest summed rank of a prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


class LowRankSum(Protocol):
    """What the adapters of a batch add to one layer."""

    def add(self, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum to the layer's output, in place and in its dtype."""
        ...


class LayerSums(Protocol):
    """The mix of one batch: a sum for every layer."""

    def add(self, path: str, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum of the layer at `path` to its output."""
        ...


@dataclass(frozen=True)
class SharedSum:
    """One mix for all prompts; weights and scalings are folded into `up_PO`."""

    down_IP: Tensor
    up_PO: Tensor

    def add(self, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum to the layer's output."""
        x_nI, y_nO = x_BSI.flatten(0, 1), y_BSO.view(-1, y_BSO.shape[-1])
        if self.up_PO.dtype is y_BSO.dtype:
            y_nO.addmm_(x_nI @ self.down_IP, self.up_PO)
        else:
            y_nO.add_(x_nI.to(self.up_PO.dtype) @ self.down_IP @ self.up_PO)
        return y_BSO


@dataclass(frozen=True)
class StackedSum:
    """All adapters that any prompt uses, side by side; `mix_B1P` scales their columns."""

    down_IP: Tensor
    up_PO: Tensor
    mix_B1P: Tensor

    def add(self, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum to the layer's output."""
        y_nO = y_BSO.view(-1, y_BSO.shape[-1])
        hidden_BSP = (x_BSI.to(self.up_PO.dtype) @ self.down_IP).mul_(self.mix_B1P)
        if self.up_PO.dtype is y_BSO.dtype:
            y_nO.addmm_(hidden_BSP.flatten(0, 1), self.up_PO)
        else:
            y_nO.add_(hidden_BSP.flatten(0, 1) @ self.up_PO)
        return y_BSO


@dataclass(frozen=True)
class GatheredSum:
    """Each prompt's own pairs; weights and scalings are folded into `up_BKO`."""

    down_BIK: Tensor
    up_BKO: Tensor

    def add(self, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum to the layer's output."""
        return y_BSO.baddbmm_(x_BSI @ self.down_BIK, self.up_BKO)


class Running:
    """The mix in force, seen by every fused layer of one model.

    It is a context variable: two threads on one model never see each other's routes.
    """

    def __init__(self) -> None:
        self._sums: ContextVar[LayerSums | None] = ContextVar("sums", default=None)

    def get(self) -> LayerSums | None:
        """Return the mix in force, or None for the base model alone."""
        return self._sums.get()

    @contextmanager
    def using(self, sums: LayerSums | None) -> Iterator[None]:
        """Run the batch in the `with` block by this mix."""
        token = self._sums.set(sums)
        try:
            yield
        finally:
            self._sums.reset(token)


class FusedLinear(nn.Module):
    """A frozen linear layer that adds what the mix in force says."""

    def __init__(self, base: nn.Module, path: str, running: Running) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.running = running

    def forward(self, x_BSI: Tensor) -> Tensor:
        """Map (B, S, I) to (B, S, O), in the dtype of the base layer's output."""
        y_BSO: Tensor = self.base(x_BSI)
        sums = self.running.get()
        return y_BSO if sums is None else sums.add(self.path, x_BSI, y_BSO)
