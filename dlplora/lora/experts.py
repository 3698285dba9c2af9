"""CGC-LoRA's experts on a model's linear layers, while they are trained (arXiv 2402.01684).

    y = W0 x + (alpha / r) Σ_e g_te B_e A_e x,    g_t = softmax(W e_t)

The experts e of task t are Nc that all tasks of the cluster share and Ns of its own. The
task-motivated gate reads nothing but a learned embedding e_t of the task. One gate serves all
layers (the paper leaves open whether each has its own): so an expert weighs the same in every
layer, and whatever the gate says is a route over the experts.

Shapes: B prompts, S tokens, I inputs, O outputs, T tasks, D width of the embeddings, E = Nc + Ns
experts of one task, r = E·R their summed rank, R the rank of one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dlplora.lora.attach import check_fusable, target_paths
from dlplora.lora.layers import in_out, set_module


class TaskGate(nn.Module):
    """Weights of a task's experts, by the task alone; at first all experts weigh the same.

    `task` is the number of the task whose batch runs.
    """

    def __init__(self, *, num_tasks: int, num_experts: int, width: int) -> None:
        super().__init__()
        self.embeddings_TD = nn.Parameter(torch.randn(num_tasks, width))
        self.weight_ED = nn.Parameter(torch.zeros(num_experts, width))
        self.task = 0

    def forward(self) -> Tensor:
        """Return the weights (E,) of the task's experts, which sum to 1."""
        logits_E: Tensor = self.weight_ED @ self.embeddings_TD[self.task]
        return logits_E.softmax(0)


class ExpertLinear(nn.Module):
    """A frozen linear layer plus the weighted sum of the experts of the gate's task.

    Each tensor holds several experts side by side: `downs` (Nc·R, I), `ups` (Nc·R, O) the common
    ones first, then those of each task, with Ns for Nc. As in LoRA, A is drawn and B is 0.
    """

    def __init__(
        self,
        base: nn.Module,
        gate: TaskGate,
        *,
        sizes: tuple[int, int],
        num_common: int,
        num_specific: int,
        rank: int,
        scaling: float,
        dropout: float,
    ) -> None:
        super().__init__()
        num_in, num_out = sizes
        ranks = [num_common * rank] + [num_specific * rank] * len(gate.embeddings_TD)
        self.base = base
        self.gate = gate
        self.rank = rank
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.downs = nn.ParameterList(
            nn.init.kaiming_uniform_(torch.empty(size, num_in), a=math.sqrt(5)) for size in ranks
        )
        self.ups = nn.ParameterList(torch.zeros(size, num_out) for size in ranks)

    def forward(self, x_BSI: Tensor) -> Tensor:
        """Map (B, S, I) to (B, S, O), in the dtype of the base layer's output."""
        y_BSO: Tensor = self.base(x_BSI)
        own = 1 + self.gate.task
        down_rI = torch.cat([self.downs[0], self.downs[own]])
        up_rO = torch.cat([self.ups[0], self.ups[own]])
        weights_r = self.gate().repeat_interleave(self.rank) * self.scaling
        hidden_BSr = self.dropout(x_BSI).to(down_rI.dtype) @ down_rI.T
        sum_BSO: Tensor = y_BSO + (hidden_BSr * weights_r) @ up_rO
        return sum_BSO.to(y_BSO.dtype)


def attach_experts(
    model: nn.Module,
    target_modules: Sequence[str],
    *,
    num_tasks: int,
    num_common: int,
    num_specific: int,
    rank: int,
    width: int,
    scaling: float,
    dropout: float,
) -> tuple[TaskGate, dict[str, ExpertLinear]]:
    """Put experts into every layer whose path ends with a target; return gate and layers.

    Draws from torch's generator. Raises `ParamsError` if a target cannot be fused.
    """
    paths = target_paths(model, target_modules)
    check_fusable(model, paths)
    device = next(model.parameters()).device
    gate = TaskGate(num_tasks=num_tasks, num_experts=num_common + num_specific, width=width)
    layers = {}
    for path in paths:
        module = model.get_submodule(path)
        sizes = in_out(module)
        assert sizes is not None
        layers[path] = ExpertLinear(
            module,
            gate,
            sizes=sizes,
            num_common=num_common,
            num_specific=num_specific,
            rank=rank,
            scaling=scaling,
            dropout=dropout,
        ).to(device)
        set_module(model, path, layers[path])
    return gate, layers
