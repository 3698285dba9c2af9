"""Sequences that a model has read and continues, each by its own route.

Shapes: B sequences, S tokens, V vocabulary.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from dlplora.attention import is_plain, knows_masks, mask_for
from dlplora.data.batches import Padded
from dlplora.engine import cache as caches
from dlplora.engine.cache import Cache, KeyValues
from dlplora.engine.single_rows import SingleRows
from dlplora.lora.layers import FusedLayers
from dlplora.lora.mix import BatchMix, Row, own_layers, row_key
from dlplora.models import Base, logits_at


class Batch:
    """Sequences with one cache: `rows` are in force, `logits_BV` predict the next tokens.

    Padding stands in front of a prompt, or between it and what it shares with others; a model that
    would take it in reads each row by itself. Rows leave when they are finished and join from other
    batches; what a row gets does not depend on the others.

    What the host decides by – mask and positions – is kept there and copied to the device with each
    forward pass; so nothing has to be read back from it but what the logits say.
    """

    def __init__(
        self,
        base: Base,
        layers: FusedLayers,
        *,
        mix: BatchMix,
        cache: Cache,
        mask_BS: Tensor,
        positions_B: Tensor,
        logits_BV: Tensor,
    ) -> None:
        self.base = base
        self.layers = layers
        self.cache = cache
        self.mask_BS = mask_BS
        self.positions_B = positions_B
        self.logits_BV = logits_BV
        self.mix = mix

    def __len__(self) -> int:
        return len(self.mix.rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        """What answers each sequence: its adapters with their weights, or layers of its own."""
        return self.mix.rows

    def fork(self) -> "Batch":
        """Return a batch that continues on its own, in the same thread; tensors are shared."""
        fork = copy.copy(self)
        fork.cache = caches.copied(self.cache)
        return fork

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> None:
        """Append one token to each sequence and predict the next."""
        self.positions_B = self.positions_B + 1
        self.mask_BS = torch.cat([self.mask_BS, torch.ones_like(self.mask_BS[:, :1])], 1)
        ids_B1 = torch.tensor(tokens)[:, None]
        batch = Padded(ids_B1, torch.ones_like(ids_B1), self.positions_B[:, None])
        if isinstance(self.cache, SingleRows):
            logits_BV = self.cache.read(self.base, self.layers, self.mix, batch, batch.mask_BS)
        else:
            device = self.base.device
            with self.layers.mixing(self.mix):
                output = self.base.model(
                    input_ids=batch.ids_BS.to(device),
                    attention_mask=mask_for(self.base.model, self.cache, self.mask_BS, 1),
                    position_ids=batch.positions_BS.to(device),
                    past_key_values=self.cache,
                    use_cache=True,
                )
            logits_BV = output.logits[:, -1]
        self.logits_BV = logits_BV.float()

    def reroute(self, rows: Sequence[Row]) -> None:
        """Continue by other rows; what the cache holds was computed under the earlier ones."""
        pairs = zip(self.rows, rows, strict=True)
        if any(old is not new and row_key(old) != row_key(new) for old, new in pairs):
            self.mix = self.mix.with_rows(rows)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all sequences but these; one that is named twice is copied."""
        if list(rows) == list(range(len(self))):
            return
        caches.select(self.cache, rows, self.base.device)
        index = torch.tensor(rows, dtype=torch.long)
        self.mask_BS = self.mask_BS[index]
        if is_plain(self.cache) and len(rows):
            is_used_S = self.mask_BS.any(0)
            if not is_used_S.all():  # columns that are padding in all rows may go
                self.mask_BS = self.mask_BS[:, is_used_S]
                caches.keep_columns(self.cache, is_used_S)
        self.positions_B = self.positions_B[index]
        self.logits_BV = self.logits_BV[index.to(self.logits_BV.device)]
        self.mix = self.mix.select(rows)

    def can_join(self, other: "Batch") -> bool:
        """Tell whether the rows of both can be put together."""
        can_grow = isinstance(self.cache, SingleRows) or is_plain(self.cache)
        return can_grow and own_layers(self.rows[0]) == own_layers(other.rows[0])

    @torch.inference_mode()
    def join(self, other: "Batch") -> None:
        """Take in the sequences of another batch, behind the own ones."""
        width = max(self.mask_BS.shape[1], other.mask_BS.shape[1])
        caches.join(self.cache, other.cache, width)
        self.mask_BS = caches.stacked([self.mask_BS, other.mask_BS], width, dim=1)
        self.positions_B = torch.cat([self.positions_B, other.positions_B])
        self.logits_BV = torch.cat([self.logits_BV, other.logits_BV])
        self.mix = self.mix.with_rows([*self.rows, *other.rows])

    @property
    def keeps_all_tokens(self) -> bool:
        """Tell whether the model goes by the keys and values of all tokens alone."""
        return knows_masks(self.base.model, self.cache)

    def num_read(self, row: int) -> int:
        """Return how many tokens of a sequence were read."""
        return int(self.positions_B[row]) + 1

    def key_values(self, row: int) -> KeyValues:
        """Copy the keys and values of a sequence's tokens."""
        return caches.key_values(self.cache, row, self.mask_BS[row])


def read_into(
    cache: Cache,
    base: Base,
    layers: FusedLayers,
    mix: BatchMix,
    batch: Padded,
    keep_BS: Tensor,
    *,
    mask: Tensor,
) -> Tensor:
    """Read tokens behind what a cache holds; return the logits (n, V) where they are wanted.

    `keep_BS` is on the host. `mask` is over the cache and these tokens: 1 where they are real
    (B, T), or what is added to the scores (B, 1, S, T).
    """
    if isinstance(cache, SingleRows):
        return cache.read(base, layers, mix, batch, keep_BS)
    if mask.dim() == 2:
        mask = mask_for(base.model, cache, mask, batch.ids_BS.shape[1])
    with layers.mixing(mix):
        return logits_at(
            base.model,
            batch.to(base.device),
            keep_BS,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
