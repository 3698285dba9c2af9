"""A check that batches of a model compute what the model does by itself."""

import torch

from dlplora.engine.batch import Batch
from dlplora.lora.attach import Pool
from dlplora.models import Base, alone_logits, check_alike, probe_rows
from dlplora.records.routes import BASE_ROUTE


@torch.inference_mode()
def check_reading(base: Base) -> None:
    """Read a few short rows of unequal lengths and go on by a token.

    Raises `ModelError` if the logits are not about those that the model has for each row alone.
    """
    rows = probe_rows(base.model)
    batch = Batch.read(base, Pool(base.model), [row[:-1] for row in rows], [BASE_ROUTE] * len(rows))
    read_BV = batch.logits_BV
    batch.step([row[-1] for row in rows])
    alone = [alone_logits(base.model, row) for row in rows]
    check_alike(base, "reading a batch", read_BV, torch.stack([part[-2] for part in alone]))
    check_alike(base, "writing", batch.logits_BV, torch.stack([part[-1] for part in alone]))
