"""Many LoRA adapters on one linear layer, each prompt with its own mix of them.

    y_b = W0 x_b + Σ_i w_bi s_i B_i A_i x_b

Exact forms of the sum, each a few operations whatever the number of adapters:

- shared: all prompts have the same mix; the weights are folded into B.
- stacked: the pairs of all adapters that any prompt uses lie side by side as one of rank P; the
  weights scale its columns, prompt by prompt.
- gathered: each prompt has only its own pairs, as one batched product.
- bagged: stacked down, and up only by each prompt's own rows, as a bag of embeddings.

Shapes: B prompts, S tokens, I inputs, O outputs, n = B·S tokens of all prompts, P summed ranks of
the adapters in use, K largest summed rank of one prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn.functional import embedding_bag


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
        _add_product(y_nO, x_nI.to(self.down_IP.dtype) @ self.down_IP, self.up_PO)
        return y_BSO


@dataclass(frozen=True)
class StackedSum:
    """All adapters that any prompt uses, side by side; `mix_B1P` scales their columns."""

    down_IP: Tensor
    up_PO: Tensor
    mix_B1P: Tensor

    def add(self, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum to the layer's output."""
        hidden_BSP = (x_BSI.to(self.down_IP.dtype) @ self.down_IP).mul_(self.mix_B1P)
        _add_product(y_BSO.view(-1, y_BSO.shape[-1]), hidden_BSP.flatten(0, 1), self.up_PO)
        return y_BSO


@dataclass(frozen=True)
class GatheredSum:
    """Each prompt's own pairs; `mix_B1K` scales their ranks."""

    down_BIK: Tensor
    up_BKO: Tensor
    mix_B1K: Tensor

    def add(self, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum to the layer's output."""
        hidden_BSK = (x_BSI @ self.down_BIK).mul_(self.mix_B1K)
        return y_BSO.baddbmm_(hidden_BSK, self.up_BKO)


@dataclass(frozen=True)
class BaggedSum:
    """All adapters down, and up by each prompt's own ranks `own_BK`, scaled by `mix_BK`."""

    down_IP: Tensor
    up_PO: Tensor
    own_BK: Tensor
    mix_BK: Tensor

    def add(self, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum to the layer's output; one token a prompt."""
        hidden_BK = (x_BSI[:, 0] @ self.down_IP).gather(1, self.own_BK).mul_(self.mix_BK)
        sum_BO = embedding_bag(self.own_BK, self.up_PO, mode="sum", per_sample_weights=hidden_BK)
        y_BSO[:, 0].add_(sum_BO)
        return y_BSO


def _add_product(y_nO: Tensor, hidden_nP: Tensor, up_PO: Tensor) -> None:
    """Add a product to an output in place, in the output's dtype."""
    if up_PO.dtype is y_nO.dtype:
        y_nO.addmm_(hidden_nP, up_PO)
    else:
        y_nO.add_(hidden_nP @ up_PO)


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
