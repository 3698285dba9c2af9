"""Systems that read no text: one adapter at random, or all with equal weights."""

from dlplora.params.systems import RandomSystem, UniformSystem
from dlplora.records.routes import Route
from dlplora.routing.simple import ConstantRouter, RandomRouter
from dlplora.systems.system import Inputs, System, pooled


def build_random(_: RandomSystem, inputs: Inputs) -> System:
    """Build the system of one adapter a prompt, drawn by the seed and the prompt."""
    router = RandomRouter(tuple(sorted(inputs.tasks)), inputs.seed)
    return System(inputs.base, pooled(inputs.pool(), inputs.adapters), router)


def build_uniform(_: UniformSystem, inputs: Inputs) -> System:
    """Build the system of all adapters, each with the weight 1/N."""
    tasks = tuple(sorted(inputs.tasks))
    router = ConstantRouter(Route(tasks, (1 / len(tasks),) * len(tasks)))
    return System(inputs.base, pooled(inputs.pool(), inputs.adapters), router)
