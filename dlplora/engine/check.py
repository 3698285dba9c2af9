"""A check that batches of a model compute what the model does by itself."""

import torch

from dlplora.engine.batch import Batch
from dlplora.lora.attach import Pool
from dlplora.models import Base, alone_logits, check_alike, probe_rows
from dlplora.records.routes import BASE_ROUTE


@torch.inference_mode()
def check_reading(base: Base) -> None:
    """Read a few short rows of unequal lengths and go on by a token in another order.

    Raises `ModelError` if the logits are not about those that the model has for each row alone.
    """
    rows = probe_rows(base.model)
    batch = Batch.read(base, Pool(base.model), [row[:-1] for row in rows], [BASE_ROUTE] * len(rows))
    alone = [alone_logits(base.model, row) for row in rows]
    check_alike(base, "reading a batch", batch.logits_BV, torch.stack([p[-2] for p in alone]))
    batch.keep(range(len(rows))[::-1])
    batch.step([row[-1] for row in rows[::-1]])
    check_alike(base, "writing", batch.logits_BV, torch.stack([p[-1] for p in alone[::-1]]))
