"""Prompts read at once: by routes, again by other routes, or by the base model as a probe.

Shapes: B prompts, I inputs of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dlplora.engine.batch import Batch
from dlplora.engine.grouping import parts_to_read
from dlplora.engine.prefill import Prefill
from dlplora.lora.attach import Pool
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import Row, row_key
from dlplora.models import Base
from dlplora.records.routes import Route


def prefill(
    base: Base, pool: Pool, prompts: Sequence[Sequence[int]], routes: Sequence[Route]
) -> Batch:
    """Read prompts, each by its route, once for all that follows.

    Prompts of like length are read together, so that little is padded.
    """
    return prefill_rows(base, pool.layers, prompts, [pool.row(route) for route in routes])


def prefill_rows(
    base: Base, layers: FusedLayers, prompts: Sequence[Sequence[int]], rows: Sequence[Row]
) -> Batch:
    """Read prompts, each by a row; it may stem from another pool than the others."""
    parts, reads = _read(base, layers, prompts, rows)
    return merged([read.batch() for read in reads], parts)


def _read(
    base: Base,
    layers: FusedLayers,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Row],
    *,
    watch: str | None = None,
) -> tuple[list[list[int]], list[Prefill]]:
    """Read prompts, those of like length together; return which were, and what was read."""
    parts = parts_to_read(base, [len(prompt) for prompt in prompts])
    reads = [
        Prefill(base, layers, [prompts[p] for p in part], [rows[p] for p in part], watch=watch)
        for part in parts
    ]
    for read in reads:
        read.advance()
    return parts, reads


def merged(batches: Sequence[Batch], parts: Sequence[Sequence[int]]) -> Batch:
    """Put batches together whose rows have these numbers; the rows come in order."""
    first, *others = batches
    for other in others:
        first.join(other)
    order = [number for part in parts for number in part]
    first.keep([order.index(number) for number in range(len(order))])
    return first


def re_prefill(batch: Batch, prompts: Sequence[Sequence[int]], rows: Sequence[Row]) -> Batch:
    """Return a batch of the same prompts by other rows; the given one is used up.

    A prompt whose row stays keeps what was read, if rows of the model's cache can be joined.
    """
    base, layers = batch.base, batch.layers
    keys = [row_key(row) for row in batch.rows]
    changed = [place for place, row in enumerate(rows) if row_key(row) != keys[place]]
    if not changed:
        return batch
    if len(changed) == len(batch) or not batch.can_join(batch):
        return prefill_rows(base, layers, prompts, rows)
    staying = [place for place in range(len(batch)) if place not in changed]
    read = prefill_rows(
        base,
        layers,
        [prompts[place] for place in changed],
        [rows[place] for place in changed],
    )
    batch.keep(staying)
    return merged([batch, read], [staying, changed])


def probe(
    base: Base, pool: Pool, prompts: Sequence[Sequence[int]], path: str
) -> tuple[Batch, Tensor]:
    """Read prompts by the base model alone, and see what a layer makes of them on the way.

    Returns the batch, which answers as the base model, and what the layer at `path` read of each
    prompt's last token (B, I). Raises `RouterError` if no adapter changes that layer.
    """
    parts, reads = _read(base, pool.layers, prompts, [()] * len(prompts), watch=path)
    inputs_I = {
        number: input_I
        for part, read in zip(parts, reads, strict=True)
        for number, input_I in zip(part, read.inputs(), strict=True)
    }
    inputs_BI = torch.stack([inputs_I[number] for number in range(len(prompts))])
    return merged([read.batch() for read in reads], parts), inputs_BI
