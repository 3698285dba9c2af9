"""LoraRetriever's fusion (arXiv 2402.09997, section 3.3): what is retrieved becomes one adapter."""

from dlplora.lora.fusion import FusionPool
from dlplora.params.systems import FusionSystem, TopK
from dlplora.routing.build import router_of
from dlplora.systems.system import Inputs, System, pooled


def build_fusion(entry: FusionSystem, inputs: Inputs) -> System:
    """Build the system that averages the matrices of a router's k likeliest adapters."""
    adapters, classifier = inputs.pool(), inputs.classifier()
    return System(
        inputs.base,
        pooled(adapters, inputs.adapters, pool_type=FusionPool),
        router_of(classifier, TopK(k=entry.k, weights="equal")),
        classifier=classifier,
    )
