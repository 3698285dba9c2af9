"""The base model without adapters."""

from dlplora.params.systems import BaseSystem
from dlplora.records.routes import BASE_ROUTE
from dlplora.routing.simple import ConstantRouter
from dlplora.systems.system import Inputs, System, pooled


def build_base(_: BaseSystem, inputs: Inputs) -> System:
    """Build the system that answers by no adapter."""
    return System(inputs.base, pooled([]), ConstantRouter(BASE_ROUTE))
