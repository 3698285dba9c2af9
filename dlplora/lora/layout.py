"""The weights of a batch laid out as low-rank sums, and which form of the sum is the fastest.

Shapes as in `lora.fused`; U adapters that any prompt of the batch uses.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding

from dlplora.errors import AdapterError
from dlplora.lora.fused import (
    Down,
    LowRankSum,
    OneInput,
    Up,
    bagged_down,
    bagged_up,
    gathered_down,
    gathered_up,
    product_down,
    product_up,
)

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
    rank: int
    scaling: float


class PairsByPath(dict[str, Pair]):
    """An adapter as batches use it: its pairs by the paths of their layers. It is never changed."""

    @cached_property
    def sha256(self) -> str:
        """The hash of its layers, matrices and scalings."""
        digest = hashlib.sha256()
        for path, pair in sorted(self.items()):
            for tensor in (pair.down_RI, pair.up_RO):
                told = f"{path} {tuple(tensor.shape)} {tensor.dtype} {pair.scaling}\n"
                digest.update(told.encode())
                digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


_Scaled = tuple[tuple[int, int, float], ...]  # adapters: number, rank and scaling on a layer


@dataclass(frozen=True)
class _Ranks:
    """Which ranks of the adapters in use each prompt has on a layer, and by what factor.

    `own_BK` are each prompt's ranks; one with fewer than K has others, with factor 0.
    """

    mix_BP: Tensor
    own_BK: Tensor
    mix_BK: Tensor


@dataclass(frozen=True)
class _Stack:
    """The matrices of all adapters in use: down for all layers of a group, up for each."""

    down_PI: Tensor
    ups_PO: tuple[Tensor, ...]


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


class Layout:
    """Lays out the sums of a batch by its weights (B, U) of these adapters.

    What layers have in common – ranks, factors, stacked matrices – is made once.
    """

    def __init__(self, weights_BU: Tensor, adapters: Sequence[PairsByPath]) -> None:
        self._weights_BU = weights_BU
        self._adapters = tuple(adapters)
        self._one_mix = bool((weights_BU == weights_BU[:1]).all())
        self._ranks: dict[_Scaled, _Ranks] = {}
        self._joint: dict[tuple[_Scaled, ...], _Ranks] = {}
        self._stacks: dict[tuple[str, ...], _Stack] = {}

    def sums(self, paths: Sequence[str], x_BSI: Tensor) -> dict[str, LowRankSum | None]:
        """Lay out the sums of layers that read one input; None where nothing is added."""
        scaled = {path: found for path in paths if (found := self._scaled(path))}
        if not scaled:
            return dict.fromkeys(paths)
        if x_BSI.dim() != 3 or len(x_BSI) != len(self._weights_BU):
            raise AdapterError(
                f"{paths[0]}: an input of {tuple(x_BSI.shape)} for the routes of "
                f"{len(self._weights_BU)} prompts; expected (prompts, tokens, inputs)"
            )
        group = tuple(scaled)
        if group not in self._stacks:
            self._stacks[group] = self._stack(scaled)
        down, ups, widths = self._halves(self._stacks[group], tuple(scaled.values()), x_BSI)
        source = OneInput(down, widths)
        sums: dict[str, LowRankSum | None] = {
            path: partial(source.add, number, up)
            for number, (path, up) in enumerate(zip(group, ups, strict=True))
        }
        return dict.fromkeys(paths) | sums

    def _halves(
        self, stack: _Stack, scaled: tuple[_Scaled, ...], x_BSI: Tensor
    ) -> tuple[Down, Sequence[Up], Sequence[int]]:
        """Return a group's way down, each layer's way up, and its share of the hidden values."""
        down_PI, ups_PO = stack.down_PI, stack.ups_PO
        dtype = down_PI.dtype
        layers = [self._ranks_of(one, down_PI) for one in scaled]
        joint = self._joint_ranks(scaled, layers)
        ranks = max(len(up_PO) for up_PO in ups_PO)
        own = [part.own_BK.shape[1] for part in layers]
        form = choose_form(
            num_prompts=len(x_BSI),
            num_tokens=x_BSI.shape[1],
            one_mix=self._one_mix,
            ranks=ranks,
            own=max(own),
        )
        if form == "gathered":
            down_BIK = embedding(joint.own_BK, down_PI).transpose(1, 2)
            mix_B1K = joint.mix_BK[:, None].to(dtype)
            gathered = [
                partial(gathered_up, up_BKO=embedding(part.own_BK, up_PO))
                for part, up_PO in zip(layers, ups_PO, strict=True)
            ]
            return partial(gathered_down, down_BIK=down_BIK, mix_B1K=mix_B1K), gathered, own
        if form == "bagged":
            mix_BK = joint.mix_BK.to(dtype)
            down = partial(bagged_down, down_IP=down_PI.T, own_BK=joint.own_BK, mix_BK=mix_BK)
            bags = [
                partial(bagged_up, own_BK=part.own_BK, up_PO=up_PO)
                for part, up_PO in zip(layers, ups_PO, strict=True)
            ]
            return down, bags, own
        if x_BSI.device.type == "cpu" and x_BSI[..., 0].numel() * ranks <= _FLOAT32_SIZE:
            dtype = torch.float32
        down_IP = down_PI.to(dtype).T.contiguous()
        widths = [len(up_PO) for up_PO in ups_PO]
        if form == "shared":
            folded = [
                partial(product_up, up_PO=(up_PO.float() * part.mix_BP[0, :, None]).to(dtype))
                for part, up_PO in zip(layers, ups_PO, strict=True)
            ]
            return partial(product_down, down_IP=down_IP, mix_B1P=None), folded, widths
        mix_B1P = joint.mix_BP[:, None].to(dtype)
        stacked = [partial(product_up, up_PO=up_PO.to(dtype)) for up_PO in ups_PO]
        return partial(product_down, down_IP=down_IP, mix_B1P=mix_B1P), stacked, widths

    def _scaled(self, path: str) -> _Scaled:
        """Return what adds anything to a layer."""
        return tuple(
            (u, pair.rank, pair.scaling)
            for u, pairs in enumerate(self._adapters)
            if (pair := pairs.get(path)) is not None and pair.scaling
        )

    def _stack(self, scaled: Mapping[str, _Scaled]) -> _Stack:
        """Put the matrices of a group of layers together."""
        pairs = {path: [self._adapters[u][path] for u, _, _ in scaled[path]] for path in scaled}
        return _Stack(
            torch.cat([pair.down_RI for path in scaled for pair in pairs[path]]),
            tuple(torch.cat([pair.up_RO for pair in pairs[path]]) for path in scaled),
        )

    def _ranks_of(self, scaled: _Scaled, like: Tensor) -> _Ranks:
        """Lay out adapters of these numbers, ranks and scalings; most layers have the same."""
        if scaled not in self._ranks:
            column_P = torch.tensor([u for u, rank, _ in scaled for _ in range(rank)])
            scalings = [scaling for _, rank, scaling in scaled for _ in range(rank)]
            scaling_P = torch.tensor(scalings, dtype=torch.float32)
            mix_BP = self._weights_BU[:, column_P] * scaling_P
            most = int((mix_BP != 0).sum(1).max())
            own_BK = (mix_BP == 0).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
            mix_BK = mix_BP.gather(1, own_BK)
            ranks = _Ranks(*(part.to(like.device) for part in (mix_BP, own_BK, mix_BK)))
            self._ranks[scaled] = ranks
        return self._ranks[scaled]

    def _joint_ranks(self, scaled: tuple[_Scaled, ...], layers: Sequence[_Ranks]) -> _Ranks:
        """Put the ranks of a group of layers side by side."""
        if scaled not in self._joint:
            widths = [part.mix_BP.shape[1] for part in layers]
            starts = [sum(widths[:number]) for number in range(len(widths))]
            self._joint[scaled] = _Ranks(
                torch.cat([part.mix_BP for part in layers], 1),
                torch.cat([p.own_BK + start for p, start in zip(layers, starts, strict=True)], 1),
                torch.cat([part.mix_BK for part in layers], 1),
            )
        return self._joint[scaled]
