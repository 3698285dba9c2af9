"""Arrow: adapters weighed anew for each token on each layer, by PEFT's own forward pass.

A layer's prototype of an adapter is the top right singular vector of its B A; a token's weights
are the softmax of |prototype · x| over the `top_k` largest (arXiv 2405.11157, section 4).
"""

from collections.abc import Sequence
from pathlib import Path

from peft import ArrowConfig, create_arrow_model

from dlplora.adapters import read_adapters
from dlplora.errors import AdapterError, one_line
from dlplora.models import Base
from dlplora.params import Arrow
from dlplora.training.merging import check_alike
from dlplora.training.warnings import ignore_peft_warnings

_ROUTER = ".lora_arrow.arrow_router"


def put_arrow(base: Base, folders: Sequence[Path], *, params: Arrow, seed: int) -> None:
    """Replace layers of the base model by PEFT's, which weigh the adapters of all folders.

    Of fewer adapters than `top_k` all are weighed. The seed draws where the search for singular
    vectors begins. Raises `AdapterError` if the adapters do not fit the base model or differ in
    layers or ranks, or if PEFT refuses them.
    """
    adapters = read_adapters(folders, base_fingerprint=base.fingerprint)
    check_alike(adapters, title="arrow")
    config = ArrowConfig(
        top_k=min(params.top_k, len(folders)),
        router_temperature=params.temperature,
        rng_seed=seed,
    )
    try:
        with ignore_peft_warnings():
            create_arrow_model(base.model, [str(folder) for folder in folders], config)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"arrow: {one_line(error)}") from error
    base.model.requires_grad_(False).train(False)
    found = {
        name.removesuffix(_ROUTER)
        for name, _ in base.model.named_modules()
        if name.endswith(_ROUTER)
    }
    if odd := sorted(found ^ adapters[0].pairs.keys()):
        raise AdapterError(f"arrow: PEFT weighs other layers than the adapters', such as {odd[0]}")
