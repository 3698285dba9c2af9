"""LoGo (arXiv 2511.07129): the adapters are asked themselves, by a probe of the base model."""

from collections.abc import Sequence

from torch import Tensor

from dlplora.engine.runner import Runner
from dlplora.params.systems import LogoSystem
from dlplora.routing.logo import build_logo
from dlplora.systems.system import Inputs, System


def build_probed(entry: LogoSystem, inputs: Inputs) -> System:
    """Build the system of LoGo's probe; neutral texts are read now, if there are any."""
    adapters = inputs.pool()
    attach = inputs.attached(adapters)

    def read(texts: Sequence[str], path: str) -> Tensor:
        with attach() as pool:
            return Runner(inputs.base, pool).inputs(texts, path)

    return System(inputs.base, attach, build_logo(entry, inputs.base.model, adapters, read))
