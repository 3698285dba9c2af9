"""One adapter for every prompt: a joint one, or a merged one."""

from dlplora.params.systems import Fixed
from dlplora.records.routes import Route
from dlplora.routing.simple import ConstantRouter
from dlplora.systems.system import Inputs, System, pooled


def build_fixed(_: Fixed, inputs: Inputs) -> System:
    """Build the system of the adapter in the artifact."""
    (adapter,) = inputs.read([inputs.artifact])
    router = ConstantRouter(Route((adapter.name,), (1.0,)))
    return System(inputs.base, pooled([adapter], inputs.artifact), router)
