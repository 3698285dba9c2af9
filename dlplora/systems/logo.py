"""LoGo (arXiv 2511.07129): the adapters are asked themselves, by a probe of the base model."""

from dlplora.engine.runner import Runner
from dlplora.params.systems import LogoSystem
from dlplora.routing.logo import build_logo
from dlplora.systems.system import Inputs, System


def build_probed(entry: LogoSystem, inputs: Inputs) -> System:
    """Build the system of LoGo's probe; neutral texts are read now, if there are any."""
    adapters = inputs.pool()
    attach = inputs.attached(adapters)
    with attach() as pool:
        probe = build_logo(entry, inputs.base.model, adapters, Runner(inputs.base, pool).inputs)
    return System(inputs.base, attach, probe)
