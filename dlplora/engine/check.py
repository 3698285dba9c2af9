"""A check that batches of a model compute what the model does by itself."""

from functools import partial

import torch

from dlplora.engine.reading import prefill
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.models import Base, alone_logits, check_alike, probe_rows
from dlplora.records.routes import BASE_ROUTE

# Measured: up to 0.01, and more where experts are chosen by a narrow margin; nothing ahead.
_GAP_OF_16_BITS, _AHEAD_OF_16_BITS = 0.05, 0.01


@torch.inference_mode()
def check_reading(base: Base) -> None:
    """Read a few short rows of unequal lengths and continue by a token each, in another order.

    Raises `ModelError` if the logits are not about those that the model has for each row alone, or
    if it looks ahead.
    """
    rows = probe_rows(base.model)
    alone = [alone_logits(base.model, row) for row in rows]
    ahead = alone_logits(base.model, [*rows[0][:-1], rows[0][0]])
    check_alike(
        base,
        "what stands before another token",
        ahead[:-1],
        alone[0][:-1],
        gap_of_16_bits=_AHEAD_OF_16_BITS,
    )
    check = partial(check_alike, base, gap_of_16_bits=_GAP_OF_16_BITS)
    batch = prefill(
        base, Pool(FusedLayers(base.model)), [row[:-1] for row in rows], [BASE_ROUTE] * len(rows)
    )
    check("reading a batch", batch.logits_BV, torch.stack([part[-2] for part in alone]))
    batch.keep(range(len(rows))[::-1])
    batch.step([row[-1] for row in rows[::-1]])
    check("writing", batch.logits_BV, torch.stack([part[-1] for part in alone[::-1]]))
