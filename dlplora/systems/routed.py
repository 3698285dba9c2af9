"""Systems that mix the adapters of the tasks that a trained router finds likeliest."""

from dlplora.params.systems import TopKSystem, TopPSystem
from dlplora.routing.build import router_of
from dlplora.systems.system import Inputs, System


def build_routed(entry: TopPSystem | TopKSystem, inputs: Inputs) -> System:
    """Build the system of a router's likeliest tasks."""
    classifier = inputs.classifier()
    return System(
        inputs.base,
        inputs.attached(inputs.pool()),
        router_of(classifier, entry),
        classifier=classifier,
    )
