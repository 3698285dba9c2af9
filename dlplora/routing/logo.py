"""LoGo (arXiv 2511.07129): the adapters that answer a prompt's last token the loudest.

    o_i = s_i B_i A_i h,   score_i = ‖o_i‖₂ or 1 / H(softmax(o_i)),   w_i = score_i / Σ score

h is what one projection reads of the prompt's last token, after the layer norm, in the base model
alone. Nothing is trained, and nothing is kept from one prompt to the next.

Shapes: B prompts, N adapters, I inputs and O outputs of the projection, P summed ranks.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import AdapterError, ParamsError, RouterError, choices
from dlplora.params.systems import LogoScore, LogoSystem
from dlplora.records.routes import BASE_ROUTE, Route

_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Logo:
    """LoGo's router over adapters that all change the projection at `path`.

    `means_N` are what each adapter's scores are divided by: its mean score on neutral texts, since
    one that was trained for longer is louder everywhere, or ones.
    """

    path: str
    labels: tuple[str, ...]
    pairs: tuple[LoraPair, ...]
    score: LogoScore
    k: int
    means_N: Tensor

    @classmethod
    def over(
        cls, adapters: Sequence[LoraAdapter], path: str, *, score: LogoScore, k: int
    ) -> "Logo":
        """Read the pairs of adapters at a path; `AdapterError` names those that have none."""
        if lacking := [adapter.name for adapter in adapters if path not in adapter.pairs]:
            raise AdapterError(
                f"adapters without {path}, which LoGo reads: {choices(lacking)}; name a block and "
                f"projection that all adapters change"
            )
        ordered = sorted(adapters, key=lambda adapter: adapter.name)
        return cls(
            path,
            tuple(adapter.name for adapter in ordered),
            tuple(adapter.pairs[path] for adapter in ordered),
            score,
            k,
            torch.ones(len(ordered), dtype=torch.double),
        )

    def calibrated(self, neutral_BI: Tensor) -> "Logo":
        """Return the router whose scores are relative to their means over neutral texts."""
        means_N = replace(self, means_N=torch.ones_like(self.means_N)).scores(neutral_BI).mean(0)
        if silent := [
            name for name, mean in zip(self.labels, means_N.tolist(), strict=True) if not mean
        ]:
            raise RouterError(
                f"{choices(silent)}: no score on any neutral text at {self.path}, so the adapter "
                f"cannot be calibrated there"
            )
        return replace(self, means_N=means_N)

    def on(self, device: torch.device) -> "Logo":
        """Return the router with its matrices, in float32, on the device of the base model."""
        pairs = tuple(
            replace(
                pair,
                down_RI=pair.down_RI.to(device, torch.float32),
                up_OR=pair.up_OR.to(device, torch.float32),
            )
            for pair in self.pairs
        )
        return replace(self, pairs=pairs)

    @torch.inference_mode()
    def scores(self, inputs_BI: Tensor) -> Tensor:
        """Score every adapter on every prompt's last token (B, N), for the host."""
        h_BI = inputs_BI.float()
        down_PI = torch.cat([pair.down_RI for pair in self.pairs]).to(h_BI)
        hidden = torch.split(h_BI @ down_PI.T, [len(pair.down_RI) for pair in self.pairs], dim=1)
        scores_BN = torch.stack(
            [
                _SCORES[self.score](hidden_BR @ (pair.scaling * pair.up_OR).to(h_BI).T)
                for hidden_BR, pair in zip(hidden, self.pairs, strict=True)
            ],
            dim=1,
        )
        return scores_BN.cpu() / self.means_N

    def routes(self, inputs_BI: Tensor) -> list[Route]:
        """Return the route of each prompt; the base model's if no adapter says anything."""
        return [self._route(row_N) for row_N in self.scores(inputs_BI)]

    def _route(self, scores_N: Tensor) -> Route:
        """Keep the k best of the pool, equal ones in the order of their names.

        The confidence is the best one's share of the whole pool's score.
        """
        if not scores_N.any():
            return BASE_ROUTE
        ranked_N, order_N = scores_N.sort(descending=True, stable=True)
        kept_K = ranked_N[: self.k]
        return Route(
            adapters=tuple(self.labels[place] for place in order_N[: self.k].tolist()),
            weights=tuple((kept_K / kept_K.sum()).tolist()),
            confidence=float(ranked_N[0] / ranked_N.sum()),
        )


def build_logo(
    params: LogoSystem,
    model: nn.Module,
    adapters: Sequence[LoraAdapter],
    read: Callable[[Sequence[str], str], Tensor],
) -> Logo:
    """Build LoGo's router over adapters of a model.

    `read(texts, path)` returns what the layer at a path reads of the last tokens of prompts
    (B, I) in the base model alone.
    """
    path = projection_path(model, projection=params.projection, block=params.block)
    logo = Logo.over(adapters, path, score=params.score, k=params.k)
    logo = logo.on(next(model.parameters()).device)
    return logo.calibrated(read(params.neutral, path)) if params.neutral else logo


def inverse_entropies(outputs_BO: Tensor) -> Tensor:
    """Return 1 / H of the softmax of outputs (B), H in nats; sure of one place, it is large."""
    logs_BO = outputs_BO.double().log_softmax(1)
    entropies_B = -(logs_BO.exp() * logs_BO).sum(1)
    return 1 / entropies_B.clamp(min=torch.finfo(torch.double).eps)


_SCORES: dict[LogoScore, Callable[[Tensor], Tensor]] = {
    "norm": lambda outputs_BO: torch.linalg.vector_norm(outputs_BO.double(), dim=1),
    "entropy": inverse_entropies,
}


def projection_path(model: nn.Module, *, projection: str, block: Literal["last"] | int) -> str:
    """Find a projection of one block of a model, such as q_proj of the last; `ParamsError` if none.

    A block is the first number in a module's path.
    """
    blocks: dict[int, list[str]] = {}
    for path, _ in model.named_modules():
        number = _BLOCK.search(path)
        if number and path.endswith(f".{projection}"):
            blocks.setdefault(int(number[1]), []).append(path)
    if not blocks:
        raise ParamsError(f"the base model has no projection {projection!r} in any block")
    chosen = max(blocks) if block == "last" else block
    if chosen not in blocks:
        raise ParamsError(
            f"the base model has no {projection!r} in block {block}; "
            f"it has it in {min(blocks)} to {max(blocks)}"
        )
    if len(blocks[chosen]) > 1:
        raise ParamsError(
            f"{projection!r} names {choices(blocks[chosen])}; expected one projection of block "
            f"{chosen}: name more of its path"
        )
    return blocks[chosen][0]
