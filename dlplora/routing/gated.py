"""Routes over CGC-LoRA's experts by a router's probabilities: no task is told.

    g = softmax(W Σ_t p_t e_t),    Δ = (alpha / r) [ Σ_i g_i B^c_i A^c_i
                                                    + Σ_t p_t Σ_j g_{Nc+j} B^s_{t,j} A^s_{t,j} ]

Common expert i weighs g_i, specific expert j of task t p_t · g_{Nc+j}: these sum to 1. Where one
task has all the probability, this is that task's own mix of experts.

Shapes: B texts, N tasks, T tasks of one cluster, E experts of one task.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dlplora.lora.cluster import Cluster
from dlplora.records.routes import Route
from dlplora.routing.base import Classifier, Probabilities


@dataclass(frozen=True)
class GatedRouter:
    """A router over the experts of clusters, whose tasks are the classifier's labels.

    A text goes to the cluster of the largest summed probability, of equals the first; there its
    probabilities are made to sum to 1.
    """

    classifier: Classifier
    clusters: Sequence[Cluster]

    def route(self, texts: Sequence[str]) -> list[Route]:
        """Return one route for each text; experts that weigh nothing are left out.

        The routes have no confidence: the first of their experts stands for no task.
        """
        p_BN = self.classifier.probabilities(texts)
        columns = [
            [self.classifier.labels.index(task) for task in cluster.tasks]
            for cluster in self.clusters
        ]
        mass_BC = np.stack([p_BN[:, own].sum(1) for own in columns], axis=1)
        routes = []
        for p_N, best in zip(p_BN, mass_BC.argmax(1), strict=True):
            p_T = p_N[columns[best]]
            routes.append(expert_route(self.clusters[best], p_T / p_T.sum()))
        return routes


def expert_route(cluster: Cluster, p_T: Probabilities) -> Route:
    """Weigh the experts of a cluster by the probabilities of its tasks."""
    gate_E = cluster.gate(torch.from_numpy(p_T)[None])[0].tolist()
    num_common = len(cluster.common)
    weights = {
        expert.name: g for expert, g in zip(cluster.common, gate_E[:num_common], strict=True)
    }
    for p, own in zip(p_T.tolist(), cluster.specific.values(), strict=True):
        for expert, g in zip(own, gate_E[num_common:], strict=True):
            weights[expert.name] = p * g
    kept = {name: weight for name, weight in weights.items() if weight}
    return Route(tuple(kept), tuple(kept.values()))
