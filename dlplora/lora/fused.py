"""Many LoRA adapters on one linear layer, each prompt with weights of its own.

    y_b = W0 x_b + Σ_i w_bi s_i B_i A_i x_b

The adapters are resident: their ranks are rows of two matrices of the layer, A and (s B)ᵀ
(`dlplora.lora.stacks`). A batch is indices and weights: the rows of each prompt and what they are
weighted by. `reference` computes the sum as it is written; three forms compute the same faster:

- `OneMix`: all prompts have the same rows and weights, which are multiplied into B.
- `Gathered`: the rows of each prompt are picked, and multiplied as one batch of products.
- `Bagged`: one product shrinks by all rows in use; each token then expands by a bag of embeddings
  of its own rows.

A form lays out the places of a batch (`dlplora.lora.picked`) once for all stacks of like layers.
`prepare` finds the rows at these places in one stack, and picks what the batch reads again and
again. `shrink` maps an input to hidden values, once for all layers that read it. `expand` adds
those of one layer to its output, in place.

Shapes: B prompts, S tokens, n = B·S, I inputs, O outputs, G layers that read one input, N rows,
K rows of one prompt, P = G·K, U places.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from dlplora.lora.picked import Picked, on_device
from dlplora.lora.stacks import Matrices, Stack

if TYPE_CHECKING:
    from dlplora.lora.mix import BatchMix

# For each prompt its rows, or the places of its rows, and their weights.
Weighted = Sequence[Sequence[tuple[int, float]]]

# Measured on a CPU (docs/log.md): batched products of fewer rows than this are slower than one.
# A GPU starts one kernel for a batch of products, whatever its size; not measured.
_GATHERED_TOKENS = {"cpu": 8, "cuda": 2}
# Up to so many rows × ranks a CPU's float32 products are faster than bfloat16's fixed costs.
_FLOAT32_SIZE = 2048


def reference(
    x_BSI: Tensor,
    y_BSO: Tensor,
    weighted_rows: Weighted,
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


@dataclass(frozen=True)
class Prepared:
    """What a form reads of a stack with each pass, for the layers at `paths`.

    `rows` are those of the prompts, for the forms that pick them with each pass.
    """

    paths: tuple[str, ...]
    down: Tensor
    ups: tuple[Tensor, ...]
    rows: Tensor


class OneMix:
    """One pair of products for prompts that all have the rows and weights of the first."""

    def __init__(self, weighted: Weighted, *, num_tokens: int, like: Tensor) -> None:
        own = weighted[0]
        self._places_K = on_device([place for place, _ in own], like.device)
        self._weights_K1 = on_device([[weight] for _, weight in own], like.device)
        is_small = len(weighted) * num_tokens * len(own) <= _FLOAT32_SIZE
        self._dtype = torch.float32 if is_small and like.device.type == "cpu" else like.dtype

    def prepare(self, stack: Stack, matrices: Matrices, picked: Picked) -> Prepared:
        """Pick the rows; the weights are multiplied into those that expand."""
        rows_K = picked.rows(stack)[self._places_K]
        down_PI = matrices.down.index_select(1, rows_K).flatten(0, 1)
        ups = (
            embedding(rows_K, up_NO).float().mul_(self._weights_K1).to(self._dtype)
            for up_NO in matrices.ups
        )
        return Prepared(matrices.paths, down_PI.to(self._dtype).T.contiguous(), tuple(ups), rows_K)

    def shrink(self, prepared: Prepared, x_BSI: Tensor) -> Sequence[Tensor]:
        """Return each layer's hidden values (B, S, K)."""
        hidden_BSP = x_BSI.to(self._dtype) @ prepared.down
        return hidden_BSP.tensor_split(len(prepared.paths), dim=-1)

    def expand(self, prepared: Prepared, layer: int, hidden_BSK: Tensor, y_BSO: Tensor) -> None:
        """Add a layer's hidden values (B, S, K) to its output."""
        up_KO = prepared.ups[layer]
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

    def __init__(self, weighted: Weighted, *, num_layers: int, like: Tensor) -> None:
        places, weights = _padded(weighted)
        self._places_BK = on_device(places, like.device)
        weights_B1K = on_device(weights, like.device)[:, None]
        self._weights_B1P = weights_B1K.repeat(1, 1, num_layers).to(like.dtype)

    def prepare(self, stack: Stack, matrices: Matrices, picked: Picked) -> Prepared:
        """Find the rows, layer after layer."""
        rows_BK = picked.rows(stack)[self._places_BK]
        num_layers, num_rows, _ = matrices.down.shape
        rows_BP = torch.cat([rows_BK + num_rows * layer for layer in range(num_layers)], 1)
        return Prepared(matrices.paths, matrices.down, matrices.ups, rows_BP)

    def shrink(self, prepared: Prepared, x_BSI: Tensor) -> Sequence[Tensor]:
        """Return each layer's hidden values (B, S, K)."""
        down_BPI = embedding(prepared.rows, prepared.down.view(-1, x_BSI.shape[-1]))
        hidden_BSP = (x_BSI @ down_BPI.transpose(1, 2)).mul_(self._weights_B1P)
        return hidden_BSP.tensor_split(len(prepared.paths), dim=-1)

    def expand(self, prepared: Prepared, layer: int, hidden_BSK: Tensor, y_BSO: Tensor) -> None:
        """Add a layer's hidden values (B, S, K) to its output."""
        rows_BK = prepared.rows[:, : hidden_BSK.shape[-1]]  # those of the first layer of `down`
        y_BSO.baddbmm_(hidden_BSK, embedding(rows_BK, prepared.ups[layer]))


class Bagged:
    """One product with all rows that are picked, of which each token takes those of its prompt."""

    def __init__(
        self,
        weighted: Weighted,
        *,
        num_places: int,
        num_layers: int,
        num_tokens: int,
        like: Tensor,
    ) -> None:
        places_BK, weights_BK = (torch.tensor(values) for values in _padded(weighted))
        places_nK, weights_nK = (
            values.repeat_interleave(num_tokens, 0) for values in (places_BK, weights_BK)
        )
        num_bags, size = places_nK.shape
        # Of hidden values (U, G, n), those of one layer are taken together.
        layers_G11 = torch.arange(num_layers)[:, None, None]
        taken_GnK = (places_nK * num_layers + layers_G11) * num_bags
        taken_GnK += torch.arange(num_bags)[:, None]
        weights = weights_nK.repeat(num_layers, 1).flatten()
        self._num_places = num_places
        self._places = on_device(places_nK.flatten(), like.device)
        self._starts_n = torch.arange(0, num_bags * size, size, device=like.device)
        self._taken = on_device(taken_GnK.flatten(), like.device)
        self._weights = on_device(weights.to(like.dtype), like.device)
        self._rows: dict[Tensor, Tensor] = {}  # most stacks have the same

    def prepare(self, stack: Stack, matrices: Matrices, picked: Picked) -> Prepared:
        """Pick the rows of all prompts for the product that shrinks."""
        rows_U = picked.rows(stack)
        if rows_U not in self._rows:
            self._rows[rows_U] = rows_U[self._places]
        down_PI = picked.down(stack, matrices)[: self._num_places].flatten(0, 1)
        return Prepared(matrices.paths, down_PI, matrices.ups, self._rows[rows_U])

    def shrink(self, prepared: Prepared, x_BSI: Tensor) -> Sequence[Tensor]:
        """Return each layer's hidden values (n·K,)."""
        hidden_Pn = prepared.down @ x_BSI.flatten(0, 1).T
        hidden = hidden_Pn.flatten().index_select(0, self._taken).mul_(self._weights)
        return hidden.tensor_split(len(prepared.paths))

    def expand(self, prepared: Prepared, layer: int, hidden: Tensor, y_BSO: Tensor) -> None:
        """Add a layer's hidden values (n·K,) to its output."""
        # torch.nn.functional.embedding_bag checks its arguments for as long as it computes.
        up_NO = prepared.ups[layer]
        sum_nO, *_ = torch.embedding_bag(
            up_NO, prepared.rows, self._starts_n, False, 0, False, hidden
        )
        y_BSO.view(sum_nO.shape).add_(sum_nO)


def _padded(weighted: Weighted) -> tuple[list[list[int]], list[list[float]]]:
    """Return places and weights; prompts with fewer than others have place 0, which is zero."""
    size = max(map(len, weighted))
    padded = [[*own, *[(0, 0.0)] * (size - len(own))] for own in weighted]
    return [[place for place, _ in own] for own in padded], [[w for _, w in own] for own in padded]


Form = OneMix | Gathered | Bagged


def lay_out(
    weighted: Weighted,
    *,
    is_one_mix: bool,
    num_places: int,
    num_layers: int,
    num_tokens: int,
    like: Tensor,
) -> Form:
    """Lay a batch out in its fastest form.

    `weighted` gives each prompt's places, of `num_places` in all; `num_tokens` are those of a
    prompt. Indices and weights stand where the tensor `like` stands, and weights have its dtype.
    """
    if is_one_mix:
        return OneMix(weighted, num_tokens=num_tokens, like=like)
    if num_tokens >= _GATHERED_TOKENS.get(like.device.type, _GATHERED_TOKENS["cuda"]):
        return Gathered(weighted, num_layers=num_layers, like=like)
    return Bagged(
        weighted,
        num_places=num_places,
        num_layers=num_layers,
        num_tokens=num_tokens,
        like=like,
    )


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
