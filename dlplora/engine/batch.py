"""Sequences that a model has read and goes on writing, each by its own route.

Shapes: B sequences, S tokens, V vocabulary, R rows of options, n places.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dlplora.data.batches import Padded, pad_left, pad_right
from dlplora.lora.attach import Pool
from dlplora.lora.mix import BatchMix
from dlplora.models import Base, logits_at
from dlplora.records.routes import Route
from dlplora.records.scores import OptionScores

_OPTION_ROWS = 64


class Batch:
    """Sequences with one cache: `routes` are in force, `logits_BV` predict the next tokens.

    The cache is padded on the left. Rows leave when they are finished and join from other
    batches; what a row gets does not depend on the others.
    """

    def __init__(
        self,
        base: Base,
        pool: Pool,
        routes: Sequence[Route],
        *,
        mix: BatchMix,
        cache: DynamicCache,
        mask_BS: Tensor,
        positions_B: Tensor,
        logits_BV: Tensor,
    ) -> None:
        self._base = base
        self._pool = pool
        self._cache = cache
        self._mask_BS = mask_BS
        self._positions_B = positions_B
        self.logits_BV = logits_BV
        self.routes = tuple(routes)
        self._mix = mix

    @classmethod
    @torch.inference_mode()
    def read(
        cls, base: Base, pool: Pool, prompts: Sequence[Sequence[int]], routes: Sequence[Route]
    ) -> "Batch":
        """Read prompts, once for all that follows."""
        padded = pad_left(prompts, base.chat.pad_id).to(base.device)
        cache = DynamicCache(config=base.model.config)
        last_BS = torch.zeros_like(padded.mask_BS, dtype=torch.bool)
        last_BS[:, -1] = True
        mix = pool.mix(routes)
        with pool.mixing(mix):
            logits_BV = logits_at(
                base.model,
                padded,
                last_BS,
                attention_mask=padded.mask_BS,
                past_key_values=cache,
                use_cache=True,
            )
        return cls(
            base,
            pool,
            routes,
            mix=mix,
            cache=cache,
            mask_BS=padded.mask_BS,
            positions_B=padded.positions_BS[:, -1],
            logits_BV=logits_BV.float(),
        )

    def __len__(self) -> int:
        return len(self.routes)

    def twin(self) -> "Batch":
        """Return a batch that goes on on its own, in the same thread; they share what they can."""
        twin = copy.copy(self)
        twin._cache = _copied(self._cache)
        return twin

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> None:
        """Append one token to each sequence and predict the next."""
        self._positions_B = self._positions_B + 1
        self._mask_BS = torch.cat([self._mask_BS, torch.ones_like(self._mask_BS[:, :1])], 1)
        with self._pool.mixing(self._mix):
            output = self._base.model(
                input_ids=torch.tensor(tokens, device=self._base.device)[:, None],
                attention_mask=self._mask_BS,
                position_ids=self._positions_B[:, None],
                past_key_values=self._cache,
                use_cache=True,
            )
        self.logits_BV = output.logits[:, -1].float()

    def reroute(self, routes: Sequence[Route]) -> None:
        """Go on by other routes; what the cache holds was made under the earlier ones.

        A sequence whose route stays keeps its adapters, also if the pool has other ones by now.
        """
        changed = {
            row: self._pool.mix([route]).rows[0]
            for row, (route, before) in enumerate(zip(routes, self.routes, strict=True))
            if route.mix != before.mix
        }
        self.routes = tuple(routes)
        if changed:
            rows = [changed.get(row, earlier) for row, earlier in enumerate(self._mix.rows)]
            self._mix = self._mix.of(rows)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all sequences but these."""
        if list(rows) == list(range(len(self))):
            return
        index = torch.tensor(rows, device=self._base.device)
        self._cache.batch_select_indices(index)
        self._mask_BS = self._mask_BS[index]
        if self.can_join and len(rows):  # columns that are padding in all rows may go
            start = int(self._mask_BS.argmax(1).min())
            self._mask_BS = self._mask_BS[:, start:]
            for layer in _layers(self._cache):
                layer.keys, layer.values = layer.keys[:, :, start:], layer.values[:, :, start:]
        self._positions_B = self._positions_B[index]
        self.logits_BV = self.logits_BV[index]
        self.routes = tuple(self.routes[row] for row in rows)
        self._mix = self._mix.select(rows)

    @property
    def can_join(self) -> bool:
        """Tell whether the model's cache is of the plain kind, whose rows can be put together."""
        return all(type(layer) is DynamicLayer for layer in self._cache.layers)

    @torch.inference_mode()
    def join(self, other: "Batch") -> None:
        """Take in the sequences of another batch, behind the own ones."""
        width = max(self._mask_BS.shape[1], other._mask_BS.shape[1])
        for mine, theirs in zip(_layers(self._cache), _layers(other._cache), strict=True):
            mine.keys = _stacked(mine.keys, theirs.keys, width, dim=2)
            mine.values = _stacked(mine.values, theirs.values, width, dim=2)
        self._mask_BS = _stacked(self._mask_BS, other._mask_BS, width, dim=1)
        self._positions_B = torch.cat([self._positions_B, other._positions_B])
        self.logits_BV = torch.cat([self.logits_BV, other.logits_BV])
        self.routes = (*self.routes, *other.routes)
        self._mix = self._mix.of([*self._mix.rows, *other._mix.rows])

    @torch.inference_mode()
    def score_options(self, options: Sequence[Sequence[str]]) -> list[OptionScores]:
        """Return the log-likelihood of each option after its sequence, which stays as it is.

        The keys and values of a sequence are reused for all of its options; an option's first
        token is predicted by the sequence alone.
        """
        rows = [(place, text) for place, texts in enumerate(options) for text in texts]
        if not rows:
            return []
        ids = [self._base.chat.answer(text) for _, text in rows]
        owners = [place for place, _ in rows]
        first_R = [tokens[0] for tokens in ids]
        sums_R = self.logits_BV.log_softmax(-1)[owners, first_R].double()
        longer = [number for number, tokens in enumerate(ids) if len(tokens) > 1]
        for start in range(0, len(longer), _OPTION_ROWS):
            part = longer[start : start + _OPTION_ROWS]
            mine = [owners[number] for number in part]
            sums_R[part] += self._score_rest(mine, [ids[number] for number in part])
        sums = sums_R.tolist()
        results = []
        for place, texts in enumerate(options):
            own = [number for number, owner in enumerate(owners) if owner == place]
            results.append(
                OptionScores(
                    options=tuple(texts),
                    logprobs=tuple(sums[number] for number in own),
                    tokens=tuple(len(ids[number]) for number in own),
                    bytes=tuple(len(text.encode()) for text in texts),
                )
            )
        return results

    def _score_rest(self, owners: Sequence[int], ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the log-likelihood of the tokens after the first of each option (R,)."""
        owner_R = torch.tensor(owners, device=self._base.device)
        cache = _copied(self._cache)
        cache.batch_select_indices(owner_R)
        padded = pad_right([tokens[:-1] for tokens in ids], self._base.chat.pad_id)
        padded = padded.to(self._base.device)
        offset_R1 = self._positions_B[owner_R, None] + 1
        keep_RS = padded.mask_BS.bool()
        with self._pool.mixing(self._mix.select(owners)):
            logits_nV = logits_at(
                self._base.model,
                Padded(padded.ids_BS, padded.mask_BS, padded.positions_BS + offset_R1),
                keep_RS,
                attention_mask=torch.cat([self._mask_BS[owner_R], padded.mask_BS], 1),
                past_key_values=cache,
                use_cache=True,
            )
        targets = [token for tokens in ids for token in tokens[1:]]
        logprobs_n = logits_nV.float().log_softmax(-1)[range(len(targets)), targets].double()
        row_n = keep_RS.nonzero()[:, 0]
        sums_R = torch.zeros(len(ids), dtype=torch.double, device=self._base.device)
        return sums_R.index_add_(0, row_n, logprobs_n)


def _copied(cache: DynamicCache) -> DynamicCache:
    """Copy a cache so that what follows does not change it; tensors are shared until then."""
    twin = copy.copy(cache)
    twin.layers = [
        copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
        for layer in cache.layers  # others, of linear attention, are changed in place
    ]
    return twin


def _layers(cache: DynamicCache) -> list[Any]:
    """Return a cache's layers; transformers' types do not tell which of them have keys."""
    return cache.layers


def _stacked(mine: Tensor, theirs: Tensor, width: int, *, dim: int) -> Tensor:
    """Put two tensors above each other, both padded on the left to `width` along `dim`."""
    padded = []
    for part in (mine, theirs):
        missing = [*part.shape]
        missing[dim] = width - part.shape[dim]
        padded.append(torch.cat([part.new_zeros(missing), part], dim))
    return torch.cat(padded)
