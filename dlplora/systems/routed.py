"""Systems that mix the adapters of the tasks that a trained router finds likeliest."""

from dlplora.params.systems import TopKSystem, TopPSystem
from dlplora.routing.build import router_of
from dlplora.systems.system import Inputs, System, pooled


def build_routed(entry: TopPSystem | TopKSystem, inputs: Inputs) -> System:
    """Build the system of a router's likeliest tasks."""
    classifier = inputs.classifier()
    return System(
        inputs.base,
        pooled(inputs.pool(), inputs.adapters),
        router_of(classifier, entry),
        classifier=classifier,
    )
