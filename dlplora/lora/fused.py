"""Many LoRA adapters on one linear layer, each prompt with weights of its own.

    y_b = W0 x_b + Σ_i w_bi s_i B_i A_i x_b

The adapters are resident: their ranks are rows of two matrices of the layer, A and (s B)ᵀ
(`dlplora.lora.stacks`). A batch is indices and weights: the rows of each prompt and what they are
weighted by. `reference` computes the sum as it is written; three forms compute the same faster:

- one mix: all prompts have the same rows and weights, which are multiplied into B.
- gathered: the rows of each prompt are picked, and multiplied as one batch of products.
- bagged: one product shrinks by all rows in use; each token then expands by a bag of embeddings
  of its own rows.

Each has two halves: `shrink` maps an input to hidden values, once for all layers that read it;
`expand` adds a layer's hidden values to its output.

Shapes: B prompts, S tokens, n = B·S, I inputs, O outputs, G layers that read one input, N rows,
K rows of one prompt, U rows that any prompt of the batch has.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

if TYPE_CHECKING:
    from dlplora.lora.mix import BatchMix
    from dlplora.lora.stacks import Stack

Form = Literal["one_mix", "gathered", "bagged"]
# From an input (B, S, I) to the hidden values of all layers, side by side in the last dimension.
Shrink = Callable[[Tensor], Tensor]
# From a layer's hidden values and its output (B, S, O) to the output with the sum, in place.
Expand = Callable[[Tensor, Tensor], Tensor]

# Measured on a CPU (docs/log.md): batched products of fewer rows than this are slower than one.
# A GPU starts one kernel for a batch of products, whatever its size; not measured.
_GATHERED_TOKENS = {"cpu": 8, "cuda": 2}
# Up to so many rows × ranks a CPU's float32 products are faster than bfloat16's fixed costs.
_FLOAT32_SIZE = 2048


def reference(
    x_BSI: Tensor,
    y_BSO: Tensor,
    *,
    rows_BK: Tensor,
    weights_BK: Tensor,
    down_NI: Tensor,
    up_NO: Tensor,
) -> Tensor:
    """Return the output (B, S, O) of a layer with the weighted sum of adapters, as float32."""
    hidden_BSK = torch.einsum("bsi,bki->bsk", x_BSI.float(), down_NI[rows_BK].float())
    hidden_BSK = hidden_BSK * weights_BK.float()[:, None]
    return y_BSO + torch.einsum("bsk,bko->bso", hidden_BSK, up_NO[rows_BK].float())


def choose_form(device: torch.device, *, num_tokens: int, is_one_mix: bool) -> Form:
    """Choose the fastest form for a batch of `num_tokens` a prompt."""
    if is_one_mix:
        return "one_mix"
    least = _GATHERED_TOKENS.get(device.type, _GATHERED_TOKENS["cuda"])
    return "gathered" if num_tokens >= least else "bagged"


def one_mix(
    down_GNI: Tensor,
    ups_NO: Sequence[Tensor],
    *,
    rows_K: Tensor,
    weights_K: Tensor,
    num_tokens: int,
) -> tuple[Shrink, list[Expand]]:
    """Prepare one pair of products for prompts that have the same rows and weights.

    `num_tokens` are those of the whole batch: few of them are multiplied as float32 on a CPU.
    """
    is_small = num_tokens * len(rows_K) <= _FLOAT32_SIZE
    dtype = torch.float32 if is_small and down_GNI.device.type == "cpu" else down_GNI.dtype
    down_IP = down_GNI.index_select(1, rows_K).flatten(0, 1).to(dtype).T.contiguous()
    expands: list[Expand] = []
    for up_NO in ups_NO:
        up_KO = embedding(rows_K, up_NO).float().mul_(weights_K[:, None]).to(dtype)
        expands.append(partial(_expand_by_one, up_KO=up_KO))
    return partial(_shrink_by_one, down_IP=down_IP), expands


def _shrink_by_one(x_BSI: Tensor, *, down_IP: Tensor) -> Tensor:
    return x_BSI.to(down_IP.dtype) @ down_IP


def _expand_by_one(hidden_BSK: Tensor, y_BSO: Tensor, *, up_KO: Tensor) -> Tensor:
    y_nO, hidden_nK = y_BSO.view(-1, y_BSO.shape[-1]), hidden_BSK.flatten(0, 1)
    if up_KO.dtype is y_nO.dtype:
        y_nO.addmm_(hidden_nK, up_KO)
    else:
        y_nO.add_(hidden_nK @ up_KO)
    return y_BSO


def gathered(
    down_GNI: Tensor, ups_NO: Sequence[Tensor], *, rows_BK: Tensor, weights_BK: Tensor
) -> tuple[Shrink, list[Expand]]:
    """Prepare a batch of products, each prompt by its own rows."""
    num_layers, num_rows, num_in = down_GNI.shape
    rows_BP = torch.cat([rows_BK + num_rows * layer for layer in range(num_layers)], 1)
    weights_B1P = weights_BK.repeat(1, num_layers)[:, None].to(down_GNI.dtype)
    down_BIP = embedding(rows_BP, down_GNI.view(-1, num_in)).transpose(1, 2)
    shrink = partial(_shrink_gathered, down_BIP=down_BIP, weights_B1P=weights_B1P)
    return shrink, [partial(_expand_gathered, up_BKO=embedding(rows_BK, up_NO)) for up_NO in ups_NO]


def _shrink_gathered(x_BSI: Tensor, *, down_BIP: Tensor, weights_B1P: Tensor) -> Tensor:
    return (x_BSI @ down_BIP).mul_(weights_B1P)


def _expand_gathered(hidden_BSK: Tensor, y_BSO: Tensor, *, up_BKO: Tensor) -> Tensor:
    return y_BSO.baddbmm_(hidden_BSK, up_BKO)


def bagged(
    down_GNI: Tensor,
    ups_NO: Sequence[Tensor],
    *,
    rows_BK: Tensor,
    weights_BK: Tensor,
    used_U: Tensor,
    places_BK: Tensor,
    num_tokens: int,
) -> tuple[Shrink, list[Expand]]:
    """Prepare one product with all rows in use, of which each token takes its prompt's own.

    `used_U` are the rows in use, `places_BK` where each prompt's stand among them; `num_tokens` are
    those of a prompt.
    """
    num_layers, device = len(down_GNI), rows_BK.device
    down_PI = down_GNI.index_select(1, used_U).flatten(0, 1)
    rows_nK, weights_nK, places_nK = (
        value if num_tokens == 1 else value.repeat_interleave(num_tokens, 0)
        for value in (rows_BK, weights_BK, places_BK)
    )
    # Hidden values of layer after layer, so that those of one are side by side.
    firsts_n1 = len(down_PI) * torch.arange(len(rows_nK), device=device)[:, None]
    firsts_G11 = len(used_U) * torch.arange(num_layers, device=device)[:, None, None]
    places = (firsts_G11 + firsts_n1 + places_nK).flatten()
    weights = weights_nK.repeat(num_layers, 1).flatten().to(down_GNI.dtype)
    starts_n = torch.arange(0, rows_nK.numel(), rows_nK.shape[1], device=device)
    rows = rows_nK.flatten()
    shrink = partial(_shrink_bagged, down_PI=down_PI, places=places, weights=weights)
    return shrink, [
        partial(_expand_bagged, rows=rows, starts_n=starts_n, up_NO=up_NO) for up_NO in ups_NO
    ]


def _shrink_bagged(x_BSI: Tensor, *, down_PI: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    hidden_nP = x_BSI.flatten(0, 1) @ down_PI.T
    return hidden_nP.flatten().index_select(0, places).mul_(weights)


def _expand_bagged(
    hidden: Tensor, y_BSO: Tensor, *, rows: Tensor, starts_n: Tensor, up_NO: Tensor
) -> Tensor:
    # As torch.nn.functional.embedding_bag, which checks its arguments for as long as it computes.
    sum_nO = torch.embedding_bag(up_NO, rows, starts_n, False, 0, False, hidden)[0]
    y_BSO.view(sum_nO.shape).add_(sum_nO)
    return y_BSO


# The mix in force, seen by every fused layer of one model; None for the base model alone. As a
# context variable: a model passes nothing on to its linear layers, and two threads on one model
# never see each other's mix.
Running: TypeAlias = "ContextVar[BatchMix | None]"


class FusedLinear(nn.Module):
    """A frozen linear layer that adds what the mix in force says.

    `stack` holds the matrices of adapters; None as long as no adapter changes the layer.
    """

    def __init__(self, base: nn.Module, path: str, running: Running) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.running = running
        self.stack: Stack | None = None

    def forward(self, x_BSI: Tensor) -> Tensor:
        """Map (B, S, I) to (B, S, O), in the dtype of the base layer's output."""
        mix = self.running.get()
        return self.base(x_BSI) if mix is None else mix.forward(self, x_BSI)
