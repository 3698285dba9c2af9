"""The trained experts of a cluster of tasks: as adapters, folded into one per task, in a file.

Shapes: B prompts, T tasks, D width of the embeddings, E = Nc + Ns experts of one task, R rank of
one expert, I inputs, O outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlplora.adapters import LoraAdapter, LoraPair
from dlplora.errors import AdapterError, unreadable
from dlplora.lora.experts import ExpertLinear, TaskGate
from dlplora.records.files import check_sha256, file_sha256, read_json, write_json

_WEIGHTS = "experts.safetensors"
_CARD = "experts.json"
_EMBEDDINGS, _GATE = "gate.embeddings", "gate.weight"


@dataclass(frozen=True)
class Cluster:
    """The experts of a cluster, each a low-rank pair for every layer, and their gate.

    `common` are Nc adapters, `specific` Ns for each task. Their names hold a dot, which no task's
    does; the scaling of all is alpha / r, with r the summed rank of a task's experts.
    """

    name: str
    base_fingerprint: str
    common: tuple[LoraAdapter, ...]
    specific: Mapping[str, tuple[LoraAdapter, ...]]
    embeddings_TD: Tensor
    weight_ED: Tensor

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order of the embeddings."""
        return tuple(self.specific)

    @property
    def experts(self) -> list[LoraAdapter]:
        """All experts, the common ones first."""
        return [*self.common, *(one for own in self.specific.values() for one in own)]

    def gate(self, shares_BT: Tensor) -> Tensor:
        """Return the weights (B, E) of common and specific experts: softmax(W Σ_t p_t e_t).

        `shares_BT` are the probabilities of the tasks; those of one task alone give its own gate.
        """
        mixed_BD = shares_BT @ self.embeddings_TD.to(shares_BT)
        return (mixed_BD @ self.weight_ED.to(shares_BT).T).softmax(1)

    def folded(self, task: str) -> LoraAdapter:
        """Fold the experts of a task into one adapter: A = cat A_e, B = cat g_te B_e. Exact."""
        own = [*self.common, *self.specific[task]]
        chosen_BT = torch.eye(len(self.tasks))[[self.tasks.index(task)]]
        gate_E = self.gate(chosen_BT)[0]
        pairs = {
            path: LoraPair(
                torch.cat([expert.pairs[path].down_RI for expert in own]),
                torch.cat(
                    [g * expert.pairs[path].up_OR for g, expert in zip(gate_E, own, strict=True)],
                    dim=1,
                ),
                self.scaling,
            )
            for path in own[0].pairs
        }
        return LoraAdapter(task, pairs)

    @property
    def scaling(self) -> float:
        """What every expert is scaled by: alpha / r."""
        return next(iter(self.common[0].pairs.values())).scaling

    @property
    def expert_rank(self) -> int:
        """The rank R of one expert."""
        return len(next(iter(self.common[0].pairs.values())).down_RI)

    def save(self, folder: Path) -> None:
        """Write experts.safetensors and experts.json."""
        tensors = {_EMBEDDINGS: self.embeddings_TD, _GATE: self.weight_ED}
        for expert in self.experts:
            for path, pair in expert.pairs.items():
                tensors[f"{expert.name}:{path}.A"] = pair.down_RI
                tensors[f"{expert.name}:{path}.B"] = pair.up_OR
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, folder / _WEIGHTS)
        gates_TE = self.gate(torch.eye(len(self.tasks)))
        num_active = len(self.weight_ED)
        card = {
            "cluster": self.name,
            "base_fingerprint": self.base_fingerprint,
            "tasks": list(self.tasks),
            "common": [expert.name for expert in self.common],
            "specific": {task: [one.name for one in own] for task, own in self.specific.items()},
            "layers": list(self.common[0].pairs),
            "scaling": self.scaling,
            "expert_rank": self.expert_rank,
            "active_rank": num_active * self.expert_rank,
            "total_rank": len(self.experts) * self.expert_rank,
            "num_parameters": sum(tensor.numel() for tensor in whole.values()),
            "gates": dict(zip(self.tasks, gates_TE.tolist(), strict=True)),
            "weights_sha256": file_sha256(folder / _WEIGHTS),
        }
        write_json(folder / _CARD, card)

    @classmethod
    def load(cls, folder: Path, *, base_fingerprint: str) -> "Cluster":
        """Read what `save` wrote.

        Raises `AdapterError` if it cannot be read, was changed since, or was trained on another
        base model.
        """
        card, tensors = _read(folder)
        if (found := card["base_fingerprint"]) != base_fingerprint:
            raise AdapterError(
                f"{folder}: trained on the base model {found[:12]}, the one in use is "
                f"{base_fingerprint[:12]}; train it again"
            )

        def expert(name: str) -> LoraAdapter:
            pairs = {
                path: LoraPair(
                    tensors[f"{name}:{path}.A"], tensors[f"{name}:{path}.B"], card["scaling"]
                )
                for path in card["layers"]
            }
            return LoraAdapter(name, pairs)

        return cls(
            name=card["cluster"],
            base_fingerprint=base_fingerprint,
            common=tuple(map(expert, card["common"])),
            specific={task: tuple(map(expert, card["specific"][task])) for task in card["tasks"]},
            embeddings_TD=tensors[_EMBEDDINGS],
            weight_ED=tensors[_GATE],
        )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        card: dict[str, Any] = read_json(folder / _CARD)
        check_sha256(folder / _WEIGHTS, card["weights_sha256"], card=_CARD, error=AdapterError)
        return card, load_file(folder / _WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise AdapterError(f"{folder}: no usable experts: {unreadable(error)}") from error


def cluster_of(
    gate: TaskGate,
    layers: Mapping[str, ExpertLinear],
    *,
    name: str,
    tasks: Sequence[str],
    base_fingerprint: str,
) -> Cluster:
    """Take the experts of trained layers, each by itself."""
    rank = next(iter(layers.values())).rank

    def taken(number: int, title: str) -> tuple[LoraAdapter, ...]:
        downs = {path: layer.downs[number].detach().split(rank) for path, layer in layers.items()}
        ups = {path: layer.ups[number].detach().split(rank) for path, layer in layers.items()}
        count = len(next(iter(downs.values())))
        return tuple(
            LoraAdapter(
                f"{title}.{place + 1}",
                {
                    path: LoraPair(downs[path][place], ups[path][place].T, layer.scaling)
                    for path, layer in layers.items()
                },
            )
            for place in range(count)
        )

    return Cluster(
        name=name,
        base_fingerprint=base_fingerprint,
        common=taken(0, f"{name}.common"),
        specific={task: taken(number, task) for number, task in enumerate(tasks, start=1)},
        embeddings_TD=gate.embeddings_TD.detach(),
        weight_ED=gate.weight_ED.detach(),
    )
