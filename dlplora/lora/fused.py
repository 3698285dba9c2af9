"""Many LoRA adapters on one linear layer, each prompt with its own mix of them.

Shapes: B prompts, S tokens, I inputs, O outputs, N adapters, P summed ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from dlplora.adapters import LoraPair
from dlplora.errors import AdapterError


class Mix:
    """The routes of a batch as weights in force, seen by every fused layer of one model.

    It is a context variable: two threads on one model never see each other's routes.
    """

    def __init__(self) -> None:
        self._weights_BN: ContextVar[Tensor | None] = ContextVar("weights_BN", default=None)

    def get(self) -> Tensor | None:
        """Return the weights (B, N) in force, or None for the base model alone."""
        return self._weights_BN.get()

    @contextmanager
    def using(self, weights_BN: Tensor | None) -> Iterator[None]:
        """Run the batch in the `with` block by these weights."""
        token = self._weights_BN.set(weights_BN)
        try:
            yield
        finally:
            self._weights_BN.reset(token)


class StackedLora(nn.Module):
    """A frozen linear layer plus N adapters, summed in two matmuls whatever N is.

        y_b = W0 x_b + Σ_i w_bi s_i B_i A_i x_b

    The adapters lie side by side as one of rank P; a prompt's mix scales the columns of each.
    Ranks may differ, and an adapter without a pair for this layer adds nothing.
    """

    down_PI: Tensor
    up_OP: Tensor
    scaling_P: Tensor
    adapter_of_P: Tensor

    def __init__(self, base: nn.Module, pairs: Sequence[LoraPair | None], mix: Mix) -> None:
        super().__init__()
        self.base = base
        self.mix = mix
        weight = next(base.parameters())
        present = [(number, pair) for number, pair in enumerate(pairs) if pair is not None]
        ranks = [(number, pair.scaling, len(pair.down_RI)) for number, pair in present]
        self.register_buffer("down_PI", torch.cat([pair.down_RI for _, pair in present]).to(weight))
        self.register_buffer("up_OP", torch.cat([pair.up_OR for _, pair in present], 1).to(weight))
        scaling = [scaling for _, scaling, rank in ranks for _ in range(rank)]
        owner = [number for number, _, rank in ranks for _ in range(rank)]
        self.register_buffer("scaling_P", torch.tensor(scaling, device=weight.device))
        self.register_buffer("adapter_of_P", torch.tensor(owner, device=weight.device))

    def forward(self, x_BSI: Tensor) -> Tensor:
        """Map (B, S, I) to (B, S, O), in the dtype of `x_BSI`."""
        y_BSO: Tensor = self.base(x_BSI)
        weights_BN = self.mix.get()
        if weights_BN is None:
            return y_BSO
        if x_BSI.dim() != 3 or len(x_BSI) != len(weights_BN):
            raise AdapterError(
                f"a fused layer got an input {tuple(x_BSI.shape)} for the routes of "
                f"{len(weights_BN)} prompts; expected (prompts, tokens, inputs)"
            )
        mix_BP = (weights_BN[:, self.adapter_of_P] * self.scaling_P).to(x_BSI.dtype)
        hidden_BSP = (x_BSI @ self.down_PI.T) * mix_BP[:, None, :]
        return y_BSO + hidden_BSP @ self.up_OP.T
