"""Many LoRA adapters on one linear layer, each prompt with weights of its own.

    y_b = W0 x_b + Σ_i w_bi s_i B_i A_i x_b

The adapters are resident: their ranks are rows of two matrices of the layer, A and (s B)ᵀ
(`dlplora.lora.stacks`). A batch is indices and weights: the rows of each prompt and what they are
weighted by. `reference` computes the sum as it is written; three forms compute the same faster:

- `OneMix`: all prompts have the same rows and weights, which are multiplied into B.
- `Gathered`: the rows of each prompt are picked, and multiplied as one batch of products.
- `Bagged`: one product shrinks by all rows in use; each token then expands by a bag of embeddings
  of its own rows.

A form lays out the indices of a batch once, for all stacks whose adapters have these rows.
`prepare` picks from a stack's matrices what the batch uses again and again. `shrink` maps an input
to hidden values, once for all layers that read it, side by side in the last dimension. `expand`
adds those of one layer to its output, in place.

Shapes: B prompts, S tokens, n = B·S, I inputs, O outputs, G layers that read one input, N rows,
K rows of one prompt, P = G·K, U rows that any prompt of the batch has.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from dlplora.lora.stacks import Matrices, Stack

if TYPE_CHECKING:
    from dlplora.lora.mix import BatchMix

# For each prompt its rows and their weights.
WeightedRows = Sequence[Sequence[tuple[int, float]]]

# Measured on a CPU (docs/log.md): batched products of fewer rows than this are slower than one.
# A GPU starts one kernel for a batch of products, whatever its size; not measured.
_GATHERED_TOKENS = {"cpu": 8, "cuda": 2}
# Up to so many rows × ranks a CPU's float32 products are faster than bfloat16's fixed costs.
_FLOAT32_SIZE = 2048


def reference(
    x_BSI: Tensor,
    y_BSO: Tensor,
    weighted_rows: WeightedRows,
    *,
    down_NI: Tensor,
    up_NO: Tensor,
) -> Tensor:
    """Return the output (B, S, O) of a layer with the weighted sum of adapters, as float32."""
    result_BSO = y_BSO.to(torch.float32, copy=True)
    for prompt, own in enumerate(weighted_rows):
        for row, weight in own:
            hidden_S = x_BSI[prompt].float() @ down_NI[row].float()
            result_BSO[prompt] += weight * hidden_S[:, None] * up_NO[row].float()
    return result_BSO


class OneMix:
    """One pair of products for prompts that all have the rows and weights of the first."""

    def __init__(self, weighted_rows: WeightedRows, *, num_tokens: int, like: Tensor) -> None:
        own = weighted_rows[0]
        self._rows_K = torch.tensor([row for row, _ in own], device=like.device)
        self._weights_K1 = torch.tensor([[weight] for _, weight in own], device=like.device)
        is_small = len(weighted_rows) * num_tokens * len(own) <= _FLOAT32_SIZE
        self._dtype = torch.float32 if is_small and like.device.type == "cpu" else like.dtype

    def prepare(self, matrices: Matrices) -> Matrices:
        """Pick the rows; the weights are multiplied into those that expand."""
        down_PI = matrices.down.index_select(1, self._rows_K).flatten(0, 1)
        ups = (
            embedding(self._rows_K, up_NO).float().mul_(self._weights_K1).to(self._dtype)
            for up_NO in matrices.ups
        )
        return Matrices(matrices.paths, down_PI.to(self._dtype).T.contiguous(), tuple(ups))

    def shrink(self, down_IP: Tensor, x_BSI: Tensor) -> Tensor:
        """Return hidden values (B, S, P)."""
        return x_BSI.to(down_IP.dtype) @ down_IP

    def expand(self, up_KO: Tensor, hidden_BSK: Tensor, y_BSO: Tensor) -> None:
        """Add a layer's hidden values (B, S, K) to its output."""
        y_nO, hidden_nK = y_BSO.view(-1, y_BSO.shape[-1]), hidden_BSK.flatten(0, 1)
        if up_KO.dtype is y_nO.dtype:
            y_nO.addmm_(hidden_nK, up_KO)
        else:
            y_nO.add_(hidden_nK @ up_KO)


class Gathered:
    """A batch of products, each prompt by its own rows.

    Rows are picked with each pass and let go at once: they are read while they are in the cache of
    the processor, and a batch holds no copy of its adapters.
    """

    def __init__(self, weighted_rows: WeightedRows, *, num_layers: int, like: Tensor) -> None:
        rows, weights = _padded(weighted_rows)
        self._rows_BK = torch.tensor(rows, device=like.device)
        weights_B1K = torch.tensor(weights, device=like.device)[:, None]
        self._weights_B1P = weights_B1K.repeat(1, 1, num_layers).to(like.dtype)

    def prepare(self, matrices: Matrices) -> Matrices:
        """Return the matrices as they are."""
        return matrices

    def shrink(self, down_GNI: Tensor, x_BSI: Tensor) -> Tensor:
        """Return hidden values (B, S, P)."""
        num_layers, num_rows, num_in = down_GNI.shape
        rows_BP = torch.cat([self._rows_BK + num_rows * layer for layer in range(num_layers)], 1)
        down_BIP = embedding(rows_BP, down_GNI.view(-1, num_in)).transpose(1, 2)
        return (x_BSI @ down_BIP).mul_(self._weights_B1P)

    def expand(self, up_NO: Tensor, hidden_BSK: Tensor, y_BSO: Tensor) -> None:
        """Add a layer's hidden values (B, S, K) to its output."""
        y_BSO.baddbmm_(hidden_BSK, embedding(self._rows_BK, up_NO))


class Bagged:
    """One product with all rows in use, of which each token takes those of its prompt."""

    def __init__(
        self, weighted_rows: WeightedRows, *, num_layers: int, num_tokens: int, like: Tensor
    ) -> None:
        rows_BK, weights_BK = (torch.tensor(values) for values in _padded(weighted_rows))
        used_U, places_BK = rows_BK.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        rows_nK, weights_nK, places_nK = (
            values.repeat_interleave(num_tokens, 0) for values in (rows_BK, weights_BK, places_BK)
        )
        num_bags, size = rows_nK.shape
        # Hidden values (n, G·U) are taken layer after layer, so that those of one are together.
        layers_G11 = torch.arange(num_layers)[:, None, None]
        tokens_n1 = torch.arange(num_bags)[:, None] * num_layers
        taken_GnK = (layers_G11 + tokens_n1) * len(used_U) + places_nK
        self._used_U = used_U.to(like.device)
        self._rows = rows_nK.flatten().to(like.device)
        self._starts_n = torch.arange(0, num_bags * size, size, device=like.device)
        self._taken = taken_GnK.flatten().to(like.device)
        self._weights = weights_nK.repeat(num_layers, 1).flatten().to(like)

    def prepare(self, matrices: Matrices) -> Matrices:
        """Pick the rows in use for the product that shrinks."""
        down_PI = matrices.down.index_select(1, self._used_U).flatten(0, 1)
        return replace(matrices, down=down_PI)

    def shrink(self, down_PI: Tensor, x_BSI: Tensor) -> Tensor:
        """Return hidden values (G·n·K,)."""
        hidden_nP = x_BSI.flatten(0, 1) @ down_PI.T
        return hidden_nP.flatten().index_select(0, self._taken).mul_(self._weights)

    def expand(self, up_NO: Tensor, hidden: Tensor, y_BSO: Tensor) -> None:
        """Add a layer's hidden values (n·K,) to its output."""
        # torch.nn.functional.embedding_bag checks its arguments for as long as it computes.
        sum_nO = torch.embedding_bag(up_NO, self._rows, self._starts_n, False, 0, False, hidden)[0]
        y_BSO.view(sum_nO.shape).add_(sum_nO)


def _padded(weighted_rows: WeightedRows) -> tuple[list[list[int]], list[list[float]]]:
    """Return rows and weights; prompts with fewer rows than others have row 0, which is zero."""
    size = max(map(len, weighted_rows))
    padded = [[*own, *[(0, 0.0)] * (size - len(own))] for own in weighted_rows]
    return [[row for row, _ in own] for own in padded], [[w for _, w in own] for own in padded]


Form = OneMix | Gathered | Bagged


def lay_out(
    weighted_rows: WeightedRows,
    *,
    is_one_mix: bool,
    num_layers: int,
    num_tokens: int,
    like: Tensor,
) -> Form:
    """Lay a batch out in its fastest form.

    `num_tokens` are those of a prompt. Indices and weights stand where the tensor `like` stands,
    and weights have its dtype.
    """
    if is_one_mix:
        return OneMix(weighted_rows, num_tokens=num_tokens, like=like)
    if num_tokens >= _GATHERED_TOKENS.get(like.device.type, _GATHERED_TOKENS["cuda"]):
        return Gathered(weighted_rows, num_layers=num_layers, like=like)
    return Bagged(weighted_rows, num_layers=num_layers, num_tokens=num_tokens, like=like)


class FusedLinear(nn.Module):
    """A frozen linear layer that adds what the mix in force says.

    `stack` holds the matrices of adapters; None as long as no adapter changes the layer. `running`
    is the mix in force of the whole model, None for the base model alone. It is a context variable
    because a model passes nothing on to its linear layers, and two threads on one model never see
    each other's mix.
    """

    def __init__(self, base: nn.Module, path: str, running: "ContextVar[BatchMix | None]") -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.running = running
        self.stack: Stack | None = None

    def forward(self, x_BSI: Tensor) -> Tensor:
        """Map (B, S, I) to (B, S, O), in the dtype of the base layer's output."""
        mix = self.running.get()
        return self.base(x_BSI) if mix is None else mix.forward(self, x_BSI)
