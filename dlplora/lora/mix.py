"""The routes of a batch as low-rank sums, and which form of the sum is the fastest.

Shapes as in `lora.fused`; U adapters that any prompt of the batch uses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dlplora.errors import AdapterError
from dlplora.lora.fused import GatheredSum, LowRankSum, SharedSum, StackedSum
from dlplora.records.routes import Route

Form = Literal["shared", "stacked", "gathered"]

# Measured by benchmarks/fused_forms.py (docs/log.md has the figures).
_GATHERED_TOKENS = 8  # batched products of fewer rows a prompt are slower than one of all
_GATHERED_RANKS = 2  # how many times the ranks of a prompt all ranks must be
_FLOAT32_SIZE = 4096  # up to so many rows × ranks bfloat16 on a CPU costs more than it saves


@dataclass(frozen=True)
class Pair:
    """One adapter's matrices on one layer, in the layer's dtype: Aᵀ (I, R), Bᵀ (R, O)."""

    down_RI: Tensor
    up_RO: Tensor
    scaling: float


PairsByPath = Mapping[str, Pair]


def choose_form(*, num_tokens: int, one_mix: bool, ranks: int, most_ranks: int) -> Form:
    """Choose the form of the sum for a batch of `num_tokens` a prompt.

    `ranks` is the summed rank of all adapters in use, `most_ranks` the largest of one prompt.
    """
    if one_mix:
        return "shared"
    if num_tokens >= _GATHERED_TOKENS and ranks >= _GATHERED_RANKS * most_ranks:
        return "gathered"
    return "stacked"


class BatchMix:
    """The mix of one batch. It keeps the matrices that it needs, whatever the pool does later.

    The matrices of a layer are laid out when it is first met, anew when the number of tokens a
    prompt changes: once for a prompt, once for all tokens that follow one by one.
    """

    def __init__(self, routes: Sequence[Route], adapters: Mapping[str, PairsByPath]) -> None:
        self._size = len(routes)
        self._names = [name for name in adapters if any(name in r.adapters for r in routes)]
        self._pairs = [adapters[name] for name in self._names]
        column = {name: number for number, name in enumerate(self._names)}
        self._weights_BU = torch.zeros(len(routes), len(self._names))
        for row, route in enumerate(routes):
            for name, weight in zip(route.adapters, route.weights, strict=True):
                self._weights_BU[row, column[name]] = weight
        self._one_mix = bool((self._weights_BU == self._weights_BU[:1]).all())
        self._num_tokens = 0
        self._sums: dict[str, LowRankSum | None] = {}

    def add(self, path: str, x_BSI: Tensor, y_BSO: Tensor) -> Tensor:
        """Add the sum of the layer at `path` to its output."""
        if x_BSI.shape[-2] != self._num_tokens:
            self._num_tokens, self._sums = x_BSI.shape[-2], {}
        try:
            found = self._sums[path]
        except KeyError:
            found = self._sums[path] = self._laid_out(path, x_BSI)
        return y_BSO if found is None else found.add(x_BSI, y_BSO)

    def _laid_out(self, path: str, x_BSI: Tensor) -> LowRankSum | None:
        if x_BSI.dim() != 3 or len(x_BSI) != self._size:
            raise AdapterError(
                f"{path}: an input of {tuple(x_BSI.shape)} for the routes of {self._size} prompts; "
                f"expected (prompts, tokens, inputs)"
            )
        placed = [
            (number, pairs[path]) for number, pairs in enumerate(self._pairs) if path in pairs
        ]
        if not placed:
            return None
        own_P = torch.tensor([number for number, pair in placed for _ in pair.down_RI])
        scaling_P = torch.tensor([pair.scaling for _, pair in placed for _ in pair.down_RI])
        mix_BP = self._weights_BU[:, own_P] * scaling_P
        down_PI = torch.cat([pair.down_RI for _, pair in placed])
        up_PO = torch.cat([pair.up_RO for _, pair in placed])
        most_ranks = int((mix_BP != 0).sum(1).max())
        form = choose_form(
            num_tokens=x_BSI.shape[1],
            one_mix=self._one_mix,
            ranks=len(own_P),
            most_ranks=most_ranks,
        )
        if form == "gathered":
            return _gathered(down_PI, up_PO, mix_BP, most_ranks)
        num_rows = x_BSI.shape[0] * x_BSI.shape[1]
        if x_BSI.device.type == "cpu" and num_rows * len(own_P) <= _FLOAT32_SIZE:
            down_PI, up_PO = down_PI.float(), up_PO.float()
        if form == "shared":
            return SharedSum(down_PI.T, _scaled(up_PO, mix_BP[0]))
        return StackedSum(down_PI.T, up_PO, mix_BP[:, None].to(up_PO))


def _gathered(down_PI: Tensor, up_PO: Tensor, mix_BP: Tensor, most_ranks: int) -> GatheredSum:
    """Pick each prompt's ranks; a prompt with fewer than the most gets others with weight 0."""
    own_BK = (mix_BP != 0).to(torch.int8).argsort(dim=1, descending=True)[:, :most_ranks]
    mix_BK = mix_BP.gather(1, own_BK)
    own_BK = own_BK.to(down_PI.device)
    return GatheredSum(down_PI[own_BK].transpose(1, 2), _scaled(up_PO[own_BK], mix_BK))


def _scaled(up_PO: Tensor, mix_P: Tensor) -> Tensor:
    """Fold weights into B, rounded once."""
    return (up_PO.float() * mix_P.to(up_PO.device)[..., None]).to(up_PO.dtype)
