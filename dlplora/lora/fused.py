"""Many LoRA adapters on one linear layer, each prompt with its own mix of them.

    y_b = W0 x_b + Σ_i w_bi s_i B_i A_i x_b

Exact forms of the sum, each a few operations whatever the number of adapters:

- shared: all prompts have the same mix; the weights are folded into B.
- stacked: the pairs of all adapters that any prompt uses lie side by side as one of rank P; the
  weights scale its columns, prompt by prompt.
- gathered: each prompt has only its own pairs, as one batched product.
- bagged: stacked down, and up only by each prompt's own rows, as a bag of embeddings.

Each has two halves, so that layers with the same input – q, k and v – go down in one product.

Shapes: B prompts, S tokens, I inputs, O outputs, n = B·S tokens of all prompts, P summed ranks of
the adapters in use, K largest summed rank of one prompt.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Protocol

from torch import Tensor, nn, split
from torch.nn.functional import embedding_bag

# The first half of the sum: from an input to the hidden values of all layers that read it, side by
# side in the last dimension.
Down = Callable[[Tensor], Tensor]
# The second half, for one layer: adds to its output, in place and in its dtype, by hidden values.
Up = Callable[[Tensor, Tensor], Tensor]
# The sum of one layer: adds to its output by its input.
LowRankSum = Callable[[Tensor, Tensor], Tensor]


def product_down(x_BSI: Tensor, *, down_IP: Tensor, mix_B1P: Tensor | None) -> Tensor:
    """Return hidden values (B, S, P) by one product, whose columns `mix_B1P` scales, if any."""
    hidden_BSP = x_BSI.to(down_IP.dtype) @ down_IP
    return hidden_BSP if mix_B1P is None else hidden_BSP.mul_(mix_B1P)


def product_up(hidden_BSP: Tensor, y_BSO: Tensor, *, up_PO: Tensor) -> Tensor:
    """Add one product with all adapters in use; the weights of a shared mix are folded in."""
    y_nO, hidden_nP = y_BSO.view(-1, y_BSO.shape[-1]), hidden_BSP.flatten(0, 1)
    if up_PO.dtype is y_nO.dtype:
        y_nO.addmm_(hidden_nP, up_PO)
    else:
        y_nO.add_(hidden_nP @ up_PO)
    return y_BSO


def gathered_down(x_BSI: Tensor, *, down_BIK: Tensor, mix_B1K: Tensor) -> Tensor:
    """Return hidden values (B, S, K) of each prompt's own ranks, scaled."""
    return (x_BSI @ down_BIK).mul_(mix_B1K)


def gathered_up(hidden_BSK: Tensor, y_BSO: Tensor, *, up_BKO: Tensor) -> Tensor:
    """Add the products with each prompt's own ranks."""
    return y_BSO.baddbmm_(hidden_BSK, up_BKO)


def bagged_down(x_BSI: Tensor, *, down_IP: Tensor, own_BK: Tensor, mix_BK: Tensor) -> Tensor:
    """Return hidden values (B, K) of one token a prompt: all adapters down, its own ranks taken."""
    return (x_BSI[:, 0] @ down_IP).gather(1, own_BK).mul_(mix_BK)


def bagged_up(hidden_BK: Tensor, y_BSO: Tensor, *, own_BK: Tensor, up_PO: Tensor) -> Tensor:
    """Add to each prompt's output a bag of its own rows, scaled."""
    sum_BO = embedding_bag(own_BK, up_PO, mode="sum", per_sample_weights=hidden_BK)
    y_BSO[:, 0].add_(sum_BO)
    return y_BSO


class OneInput:
    """The hidden values of all layers that read one input, computed when the first asks.

    `widths` are the layers' shares of the hidden values. Nothing is kept once all have asked.
    """

    def __init__(self, down: Down, widths: Sequence[int]) -> None:
        self._down = down
        self._widths = list(widths)
        self._x: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self._asked = 0

    def part(self, number: int, x_BSI: Tensor) -> Tensor:
        """Return a layer's hidden values; computed again for any other input than the last."""
        if len(self._widths) == 1:
            return self._down(x_BSI)
        if x_BSI is not self._x:
            self._x, self._asked = x_BSI, 0
            self._parts = split(self._down(x_BSI), self._widths, dim=-1)
        part = self._parts[number]
        self._asked += 1
        if self._asked == len(self._widths):
            self._x, self._parts = None, ()
        return part

    def add(self, number: int, up: Up, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum of the `number`-th layer to its output, in place and in its dtype."""
        return up(self.part(number, x_BSI), y_BSO)


class LayerSums(Protocol):
    """The mix of one batch: a sum for every layer."""

    def add(self, path: str, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum of the layer at `path` to its output."""


# The mix in force, seen by every fused layer of one model; None for the base model alone. As a
# context variable: two threads on one model never see each other's routes.
Running = ContextVar[LayerSums | None]


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
