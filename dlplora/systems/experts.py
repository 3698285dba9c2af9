"""CGC-LoRA (arXiv 2402.01684): as published, by the oracle task, or gated by a router."""

from dlplora.errors import AdapterError, choices
from dlplora.lora.cluster import Cluster
from dlplora.params.systems import ExpertsByTask, GatedExperts
from dlplora.routing.gated import GatedRouter
from dlplora.systems.by_task import told_system
from dlplora.systems.system import Inputs, System, pooled


def build_experts_by_task(entry: ExpertsByTask, inputs: Inputs) -> System:
    """Build the system that answers by the experts of the task, folded into one adapter."""
    folders = []
    for task in inputs.tasks:
        places = [inputs.artifact / name / "adapters" / task for name in entry.clusters]
        folders.append(next((place for place in places if place.is_dir()), places[0]))
    return told_system(inputs, inputs.read(folders), inputs.artifact)


def build_gated_experts(entry: GatedExperts, inputs: Inputs) -> System:
    """Build the system that mixes the experts of a cluster by a router's probabilities."""
    clusters = [
        Cluster.load(inputs.artifact / name, base_fingerprint=inputs.base.fingerprint)
        for name in entry.clusters
    ]
    tasks = {task for cluster in clusters for task in cluster.tasks}
    if uneven := tasks ^ set(inputs.tasks):
        raise AdapterError(
            f"{inputs.artifact}: {choices(uneven)}: not both a task and one with experts; "
            f"`dlplora repro` brings them up to date"
        )
    classifier = inputs.classifier()
    experts = [expert for cluster in clusters for expert in cluster.experts]
    return System(
        inputs.base,
        pooled(experts, inputs.artifact),
        GatedRouter(classifier, clusters),
        classifier=classifier,
    )
