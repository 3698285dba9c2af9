"""The routes of a batch as low-rank sums, and which form of the sum is the fastest.

Shapes as in `lora.fused`; U adapters that any prompt of the batch uses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding

from dlplora.errors import AdapterError
from dlplora.lora.fused import BaggedSum, GatheredSum, LowRankSum, SharedSum, StackedSum

Form = Literal["shared", "stacked", "gathered", "bagged"]

# Measured (docs/log.md): batched products of fewer rows a prompt are slower than one of all, and
# gain nothing unless the ranks of all prompts are several times those of one.
_GATHERED_TOKENS = 8
_GATHERED_RANKS = 2
# Up to so many rows × ranks a CPU's float32 products are faster than bfloat16's fixed costs.
_FLOAT32_SIZE = 2048


@dataclass(frozen=True)
class Pair:
    """One adapter's matrices on one layer, in the layer's dtype: A (R, I), Bᵀ (R, O)."""

    down_RI: Tensor
    up_RO: Tensor
    scaling: float


PairsByPath = Mapping[str, Pair]


@dataclass(frozen=True)
class _Ranks:
    """Which ranks of the adapters in use each prompt has on a layer, and by what factor.

    `own_BK` are each prompt's ranks; one with fewer than K has others, with factor 0.
    """

    mix_BP: Tensor
    own_BK: Tensor
    mix_BK: Tensor


def choose_form(*, num_prompts: int, num_tokens: int, one_mix: bool, ranks: int, own: int) -> Form:
    """Choose the form of the sum for a batch of `num_tokens` a prompt.

    `ranks` is the summed rank of all adapters in use, `own` the largest of one prompt.
    """
    if one_mix:
        return "shared"
    if num_tokens >= _GATHERED_TOKENS and ranks >= _GATHERED_RANKS * own:
        return "gathered"
    if num_tokens == 1 and num_prompts * ranks > _FLOAT32_SIZE:
        return "bagged"
    return "stacked"


Row = tuple[tuple[PairsByPath, float], ...]  # the adapters of one prompt, with their weights


class BatchMix:
    """The mix of one batch. It keeps the adapters that it needs, whatever the pool does later.

    The matrices of a layer are put together when it is first met, and laid out anew when the
    number of tokens a prompt changes: once for a prompt, once for all tokens that follow.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        used = {id(pairs): pairs for row in rows for pairs, _ in row}
        column = {known: number for number, known in enumerate(used)}
        weights_BU = torch.zeros(len(rows), len(used))
        for number, row in enumerate(rows):
            for pairs, weight in row:
                weights_BU[number, column[id(pairs)]] = weight
        self._weights_BU = weights_BU
        self._one_mix = bool((weights_BU == weights_BU[:1]).all())
        self._adapters = list(used.values())
        self._ranks: dict[tuple[tuple[int, int, float], ...], _Ranks] = {}
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._num_tokens = 0
        self._sums: dict[str, LowRankSum | None] = {}

    def select(self, rows: Sequence[int]) -> "BatchMix":
        """Return the mix of some of the prompts."""
        return BatchMix([self.rows[row] for row in rows])

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
        placed = [(u, pairs[path]) for u, pairs in enumerate(self._adapters) if path in pairs]
        if not placed:
            return None
        if x_BSI.dim() != 3 or len(x_BSI) != len(self._weights_BU):
            raise AdapterError(
                f"{path}: an input of {tuple(x_BSI.shape)} for the routes of "
                f"{len(self._weights_BU)} prompts; expected (prompts, tokens, inputs)"
            )
        if path not in self._stacks:
            down_PI = torch.cat([pair.down_RI for _, pair in placed])
            self._stacks[path] = down_PI, torch.cat([pair.up_RO for _, pair in placed])
        down_PI, up_PO = self._stacks[path]
        ranks = self._ranks_of(tuple((u, len(p.down_RI), p.scaling) for u, p in placed), up_PO)
        if not ranks.own_BK.shape[1]:  # all weights are 0
            return None
        form = choose_form(
            num_prompts=len(x_BSI),
            num_tokens=x_BSI.shape[1],
            one_mix=self._one_mix,
            ranks=len(up_PO),
            own=ranks.own_BK.shape[1],
        )
        if form == "gathered":
            down_BIK = embedding(ranks.own_BK, down_PI).transpose(1, 2)
            mix_B1K = ranks.mix_BK[:, None].to(up_PO.dtype)
            return GatheredSum(down_BIK, embedding(ranks.own_BK, up_PO), mix_B1K)
        if form == "bagged":
            return BaggedSum(down_PI.T, up_PO, ranks.own_BK, ranks.mix_BK.to(up_PO.dtype))
        if up_PO.device.type == "cpu" and x_BSI[..., 0].numel() * len(up_PO) <= _FLOAT32_SIZE:
            down_PI, up_PO = down_PI.float(), up_PO.float()
        down_IP = down_PI.T.contiguous()
        if form == "shared":
            folded_PO = up_PO.float() * ranks.mix_BP[0, :, None]
            return SharedSum(down_IP, folded_PO.to(up_PO.dtype))
        return StackedSum(down_IP, up_PO, ranks.mix_BP[:, None].to(up_PO.dtype))

    def _ranks_of(self, placed: tuple[tuple[int, int, float], ...], like: Tensor) -> _Ranks:
        """Lay out adapters of these numbers, ranks and scalings; most layers have the same."""
        if placed not in self._ranks:
            column_P = torch.tensor([u for u, rank, _ in placed for _ in range(rank)])
            scaling_P = torch.tensor([scaling for _, rank, scaling in placed for _ in range(rank)])
            mix_BP = self._weights_BU[:, column_P] * scaling_P
            most = int((mix_BP != 0).sum(1).max())
            own_BK = (mix_BP == 0).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
            mix_BK = mix_BP.gather(1, own_BK)
            ranks = _Ranks(*(part.to(like.device) for part in (mix_BP, own_BK, mix_BK)))
            self._ranks[placed] = ranks
        return self._ranks[placed]
