"""The keys and values of a batch: rows are selected, copied and put together.

Shapes: B rows, H heads, S tokens, D width of a head.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dlplora.engine.single_rows import SingleRows
from dlplora.models import Base, reads_apart

Cache = DynamicCache | SingleRows
# The keys and values (H, S, D) of one row's tokens, layer by layer.
KeyValues = tuple[tuple[Tensor, Tensor], ...]


def new_cache(base: Base, num_rows: int) -> Cache:
    """Return an empty cache for rows of a model."""
    if reads_apart(base.model):
        return SingleRows(num_rows)
    return DynamicCache(config=base.model.config)


def copied(cache: Cache) -> Cache:
    """Copy a cache so that what follows does not change it; tensors are shared until then."""
    if isinstance(cache, SingleRows):
        return cache.copy()
    fork = copy.copy(cache)
    fork.layers = [
        copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
        for layer in cache.layers  # others, of linear attention, are changed in place
    ]
    return fork


def select(cache: Cache, rows: Sequence[int], device: torch.device) -> None:
    """Keep these rows of a cache on a device; one that is named twice is copied."""
    if isinstance(cache, SingleRows):
        cache.select(rows)
    else:
        cache.batch_select_indices(torch.tensor(rows, dtype=torch.long, device=device))


def join(cache: Cache, other: Cache, width: int) -> None:
    """Take in the rows of another cache, behind the own ones, all padded to `width` in front."""
    if isinstance(cache, SingleRows) and isinstance(other, SingleRows):
        cache.extend(other)
    for mine, theirs in zip(_layers(cache), _layers(other), strict=True):
        mine.keys = stacked([mine.keys, theirs.keys], width, dim=2)
        mine.values = stacked([mine.values, theirs.values], width, dim=2)


def keep_columns(cache: Cache, kept_S: Tensor) -> None:
    """Let go of columns that are padding in all rows of a plain cache; the mask is the host's."""
    places_n = kept_S.nonzero()[:, 0]
    for layer in _layers(cache):
        places_n = places_n.to(layer.keys.device)
        layer.keys = layer.keys.index_select(2, places_n)
        layer.values = layer.values.index_select(2, places_n)


def key_values(cache: Cache, row: int, mask_S: Tensor) -> KeyValues:
    """Copy a row's keys and values out of a plain cache, without padding by the host's mask."""
    found = []
    places_n = mask_S.nonzero()[:, 0]
    for layer in _layers(cache):
        places_n = places_n.to(layer.keys.device)
        parts = (part[row].index_select(1, places_n) for part in (layer.keys, layer.values))
        found.append(tuple(parts))
    return tuple(found)


def fill(cache: Cache, rows: Sequence[KeyValues | None]) -> Tensor:
    """Put known keys and values into an empty plain cache; rows without any are padding.

    Returns which columns are real (B, S), on the host.
    """
    known = next(row for row in rows if row is not None)
    lengths = [0 if row is None else row[0][0].shape[1] for row in rows]
    width = max(lengths)
    assert isinstance(cache, DynamicCache)
    for number, (keys, values) in enumerate(known):
        empty = keys[:, :0], values[:, :0]
        parts = [empty if row is None else row[number] for row in rows]
        keys_BHSD = stacked([part[0][None] for part in parts], width, dim=2)
        values_BHSD = stacked([part[1][None] for part in parts], width, dim=2)
        cache.update(keys_BHSD, values_BHSD, number)
    starts_B = torch.tensor([width - length for length in lengths])
    return (torch.arange(width) >= starts_B[:, None]).long()


def stacked(parts: Sequence[Tensor], width: int, *, dim: int) -> Tensor:
    """Put tensors above each other, all padded on the left to `width` along `dim`."""
    padded = []
    for part in parts:
        missing = [*part.shape]
        missing[dim] = width - part.shape[dim]
        padded.append(torch.cat([part.new_zeros(missing), part], dim) if missing[dim] else part)
    return torch.cat(padded)


def _layers(cache: Cache) -> list[Any]:
    """Return a cache's layers; transformers' types do not tell which of them have keys."""
    return cache.layers
