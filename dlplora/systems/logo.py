"""LoGo (arXiv 2511.07129): the adapters are asked themselves, by a probe of the base model."""

from collections.abc import Sequence

from torch import Tensor

from dlplora.engine.reading import probe
from dlplora.lora.layers import fused
from dlplora.params.systems import LogoSystem
from dlplora.routing.logo import build_logo
from dlplora.systems.system import Inputs, System, pooled


def build_probed(entry: LogoSystem, inputs: Inputs) -> System:
    """Build the system of LoGo's probe; neutral texts are read now, if there are any."""
    adapters = inputs.pool()
    pool = pooled(adapters, inputs.adapters)

    def read(texts: Sequence[str], path: str) -> Tensor:
        prompts = [inputs.base.chat.prompt(text) for text in texts]
        with fused(inputs.base.model) as layers:
            return probe(inputs.base, pool.make(layers), prompts, path)[1]

    return System(inputs.base, pool, build_logo(entry, inputs.base.model, adapters, read))
