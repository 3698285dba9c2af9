"""Sequences that a model has read and goes on writing, each by its own route.

Shapes: B sequences, S tokens, V vocabulary, R rows of options, n places.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dlplora.data.batches import Padded, pad_left, pad_right, shared_beginning
from dlplora.engine.apart import Apart
from dlplora.errors import RouterError
from dlplora.lora.attach import Pool
from dlplora.lora.mix import BatchMix, Row, Watch
from dlplora.models import Base, logits_at, reads_apart
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.records.scores import OptionScores

_OPTION_TOKENS = 1024
# Measured (docs/log.md): reading in two parts costs what so many tokens more in one would.
_APART_TOKENS = 256

Cache = DynamicCache | Apart


class Batch:
    """Sequences with one cache: `routes` are in force, `logits_BV` predict the next tokens.

    Padding stands in front of a prompt, or between it and what it shares with others; a model that
    would take it in reads each row by itself. Rows leave when they are finished and join from other
    batches; what a row gets does not depend on the others.
    """

    def __init__(
        self,
        base: Base,
        pool: Pool,
        routes: Sequence[Route],
        *,
        mix: BatchMix,
        cache: Cache,
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
        cls,
        base: Base,
        pool: Pool,
        prompts: Sequence[Sequence[int]],
        routes: Sequence[Route],
        *,
        rows: Sequence[Row] | None = None,
    ) -> "Batch":
        """Read prompts, once for all that follows, by routes or by `rows` taken for them before.

        Prompts of like length are read together, so that little is padded. What all of a part
        begin with is read once for each mix that is in use, if that saves time, and its keys and
        values go to every prompt of that mix.
        """
        mix = pool.mix(routes) if rows is None else pool.mix_rows(rows)
        return cls._read_in_parts(base, pool, prompts, routes, mix)

    @classmethod
    @torch.inference_mode()
    def probe(
        cls, base: Base, pool: Pool, prompts: Sequence[Sequence[int]], path: str
    ) -> tuple["Batch", Tensor]:
        """Read prompts by the base model alone, and see what a layer makes of them on the way.

        Returns the batch, which answers as the base model, and what the layer at `path` read of
        each prompt's last token (B, I). Raises `RouterError` if no adapter changes that layer.
        """
        routes = [BASE_ROUTE] * len(prompts)
        watch = Watch(path, range(len(prompts)))
        batch = cls._read_in_parts(base, pool, prompts, routes, pool.mix(routes).watched(watch))
        if not watch.seen:
            raise RouterError(
                f"{path}: no adapter changes this layer, so nothing can be read there"
            )
        batch._mix = batch._mix.of(batch.rows)
        return batch, torch.stack([watch.seen[number] for number in range(len(prompts))])

    @classmethod
    def _read_in_parts(
        cls,
        base: Base,
        pool: Pool,
        prompts: Sequence[Sequence[int]],
        routes: Sequence[Route],
        mix: BatchMix,
    ) -> "Batch":
        parts = parts_to_read([len(prompt) for prompt in prompts])
        if len(parts) == 1 or not _is_plain(_new_cache(base, len(prompts))):
            return cls._read(base, pool, prompts, routes, mix)
        batch, *others = (
            cls._read(
                base,
                pool,
                [prompts[place] for place in part],
                [routes[place] for place in part],
                mix.select(part),
            )
            for part in parts
        )
        for other in others:
            batch.join(other)
        order = [place for part in parts for place in part]
        batch.keep([order.index(place) for place in range(len(prompts))])
        return batch

    @classmethod
    def _read(
        cls,
        base: Base,
        pool: Pool,
        prompts: Sequence[Sequence[int]],
        routes: Sequence[Route],
        mix: BatchMix,
    ) -> "Batch":
        cache = _new_cache(base, len(prompts))
        firsts, owners = mix.distinct()
        shared = shared_beginning(prompts) if _knows_masks(base, cache) else 0
        if shared * (len(prompts) - len(firsts)) < _APART_TOKENS:  # not worth a part of its own
            shared = 0
        if shared:
            prefix = pad_left([prompts[row][:shared] for row in firsts], base.chat.pad_id)
            nowhere_BS = torch.zeros_like(prefix.mask_BS, dtype=torch.bool)
            _read_into(
                cache, base, pool, mix.select(firsts), prefix, nowhere_BS, mask=prefix.mask_BS
            )
            cache.batch_select_indices(torch.tensor(owners, device=base.device))
        padded = pad_left([prompt[shared:] for prompt in prompts], base.chat.pad_id)
        shared_BS = torch.ones(len(prompts), shared, dtype=padded.mask_BS.dtype)
        mask_BS = torch.cat([shared_BS, padded.mask_BS], 1).to(base.device)
        padded = replace(padded, positions_BS=padded.positions_BS + shared).to(base.device)
        last_BS = torch.zeros_like(padded.ids_BS, dtype=torch.bool)
        last_BS[:, -1] = True
        logits_BV = _read_into(cache, base, pool, mix, padded, last_BS, mask=mask_BS)
        return cls(
            base,
            pool,
            routes,
            mix=mix,
            cache=cache,
            mask_BS=mask_BS,
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
        ids_B1 = torch.tensor(tokens, device=self._base.device)[:, None]
        if isinstance(self._cache, Apart):
            whole = torch.ones_like(ids_B1)
            batch = Padded(ids_B1, whole, self._positions_B[:, None])
            logits_BV = self._cache.read(self._base, self._pool, self._mix, batch, whole)
        else:
            with self._pool.mixing(self._mix):
                output = self._base.model(
                    input_ids=ids_B1,
                    attention_mask=self._mask_BS,
                    position_ids=self._positions_B[:, None],
                    past_key_values=self._cache,
                    use_cache=True,
                )
            logits_BV = output.logits[:, -1]
        self.logits_BV = logits_BV.float()

    def reroute(self, routes: Sequence[Route], rows: Sequence[Row] | None = None) -> None:
        """Go on by other routes; what the cache holds was made under the earlier ones.

        `rows` are the adapters taken for them before. A sequence whose route stays keeps its
        adapters, also if the pool has other ones by now.
        """
        changed = {
            place: self._pool.row(route) if rows is None else rows[place]
            for place, (route, before) in enumerate(zip(routes, self.routes, strict=True))
            if route.mix != before.mix
        }
        self.routes = tuple(routes)
        if changed:
            mixed = [changed.get(place, earlier) for place, earlier in enumerate(self.rows)]
            self._mix = self._mix.of(mixed)

    def read_anew(
        self,
        prompts: Sequence[Sequence[int]],
        routes: Sequence[Route],
        rows: Sequence[Row] | None = None,
    ) -> "Batch":
        """Return a batch of the same prompts by other routes; this one is used up.

        A prompt whose route has the same mix as before keeps what was read, if the cache's rows
        can be put together with others.
        """
        changed = [
            place
            for place, (route, before) in enumerate(zip(routes, self.routes, strict=True))
            if route.mix != before.mix
        ]
        if len(changed) == len(self) or (changed and not self.can_join):
            return Batch.read(self._base, self._pool, prompts, routes, rows=rows)
        staying = [place for place in range(len(self)) if place not in changed]
        self.routes = tuple(routes)
        if changed:
            self.keep(staying)
            self.join(
                Batch.read(
                    self._base,
                    self._pool,
                    [prompts[place] for place in changed],
                    [routes[place] for place in changed],
                    rows=None if rows is None else [rows[place] for place in changed],
                )
            )
            order = [*staying, *changed]
            self.keep([order.index(place) for place in range(len(prompts))])
        return self

    @property
    def rows(self) -> tuple[Row, ...]:
        """The adapters of each sequence, with their weights."""
        return self._mix.rows

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Let go of all sequences but these."""
        if list(rows) == list(range(len(self))):
            return
        index = torch.tensor(rows, device=self._base.device)
        self._cache.batch_select_indices(index)
        self._mask_BS = self._mask_BS[index]
        if self.can_join and len(rows):  # columns that are padding in all rows may go
            is_used_S = self._mask_BS.any(0)
            if not is_used_S.all():
                self._mask_BS = self._mask_BS[:, is_used_S]
                for layer in _layers(self._cache):
                    layer.keys = layer.keys[:, :, is_used_S]
                    layer.values = layer.values[:, :, is_used_S]
        self._positions_B = self._positions_B[index]
        self.logits_BV = self.logits_BV[index]
        self.routes = tuple(self.routes[row] for row in rows)
        self._mix = self._mix.select(rows)

    @property
    def can_join(self) -> bool:
        """Tell whether the model's cache is of a kind whose rows can be put together."""
        return isinstance(self._cache, Apart) or _is_plain(self._cache)

    @torch.inference_mode()
    def join(self, other: "Batch") -> None:
        """Take in the sequences of another batch, behind the own ones."""
        if isinstance(self._cache, Apart) and isinstance(other._cache, Apart):
            self._cache.extend(other._cache)
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

        The keys and values of a sequence are reused for all of its options, which stand behind
        it side by side, none seeing the others; an option's first token is predicted by the
        sequence alone.
        """
        rows = [(place, text) for place, texts in enumerate(options) for text in texts]
        if not rows:
            return []
        ids = [self._base.chat.answer(text) for _, text in rows]
        owners = [place for place, _ in rows]
        first_R = [tokens[0] for tokens in ids]
        sums_R = self.logits_BV.log_softmax(-1)[owners, first_R].double()
        longer = [number for number, tokens in enumerate(ids) if len(tokens) > 1]
        for part in self._parts(longer, owners, ids):
            flat = [number for _, branches in part for number in branches]
            sums_R[flat] += self._score_rest(
                [owner for owner, _ in part],
                [[ids[number] for number in branches] for _, branches in part],
            )
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

    def _parts(
        self, numbers: Sequence[int], owners: Sequence[int], ids: Sequence[Sequence[int]]
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """Cut options into parts of so many places, padding included: sequences with options.

        One that stands alone may be longer. Where a model knows no masks but its own, each
        option is a row of its own.
        """
        side_by_side = _knows_masks(self._base, self._cache)
        part: list[tuple[int, list[int]]] = []
        widest = 0
        for number in numbers:
            size = len(ids[number]) - 1
            joins = side_by_side and part and part[-1][0] == owners[number]
            width = size + (sum(len(ids[other]) - 1 for other in part[-1][1]) if joins else 0)
            num_rows = len(part) + (not joins)
            if part and num_rows * max(widest, width) > _OPTION_TOKENS:
                yield part
                part, widest, joins, width = [], 0, False, size
            if joins:
                part[-1][1].append(number)
            else:
                part.append((owners[number], [number]))
            widest = max(widest, width)
        if part:
            yield part

    def _score_rest(
        self, owners: Sequence[int], branches: Sequence[Sequence[Sequence[int]]]
    ) -> Tensor:
        """Return the log-likelihood of the tokens after the first of each option (R,)."""
        read = [[token for ids in own for token in ids[:-1]] for own in branches]
        padded = pad_right(read, self._base.chat.pad_id)
        places_BS, branch_BS = torch.zeros_like(padded.ids_BS), torch.full_like(padded.ids_BS, -1)
        for row, own in enumerate(branches):
            lengths = [len(ids) - 1 for ids in own]
            size = sum(lengths)
            places_BS[row, :size] = torch.cat([torch.arange(length) for length in lengths])
            branch_BS[row, :size] = torch.arange(len(own)).repeat_interleave(torch.tensor(lengths))
        owner_B = torch.tensor(owners, device=self._base.device)
        past_BS = self._mask_BS[owner_B]
        if max(map(len, branches)) > 1:
            mask = _branching(past_BS, branch_BS.to(past_BS.device), self._base.model.dtype)
        else:
            mask = torch.cat([past_BS, padded.mask_BS.to(past_BS.device)], 1)
        start_B1 = self._positions_B[owner_B, None].cpu() + 1
        cache = _copied(self._cache)
        cache.batch_select_indices(owner_B)
        keep_BS = padded.mask_BS.bool()
        padded = replace(padded, positions_BS=places_BS + start_B1)
        mix = self._mix.select(owners)
        logits_nV = _read_into(cache, self._base, self._pool, mix, padded, keep_BS, mask=mask)
        targets = [token for own in branches for ids in own for token in ids[1:]]
        logprobs_n = logits_nV.float().log_softmax(-1)[range(len(targets)), targets].double()
        lengths_R = torch.tensor([len(ids) - 1 for own in branches for ids in own])
        option_n = torch.arange(len(lengths_R)).repeat_interleave(lengths_R)
        sums_R = torch.zeros(len(lengths_R), dtype=torch.double, device=self._base.device)
        return sums_R.index_add_(0, option_n.to(sums_R.device), logprobs_n)


def parts_to_read(lengths: Sequence[int]) -> list[list[int]]:
    """Cut prompts of these lengths into parts that are read with the least effort.

    The effort of a part is its tokens, padding included, and what any part costs. Returns the
    numbers of the prompts, the shortest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best: list[tuple[int, int]] = [(0, 0)]  # the effort of the first prompts, its last part's start
    for end, row in enumerate(order, start=1):
        best.append(
            min(
                (best[start][0] + lengths[row] * (end - start) + _APART_TOKENS, start)
                for start in range(end)
            )
        )
    parts: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        parts.append(order[start:end])
        end = start
    return parts[::-1]


def _read_into(
    cache: Cache,
    base: Base,
    pool: Pool,
    mix: BatchMix,
    batch: Padded,
    keep_BS: Tensor,
    *,
    mask: Tensor,
) -> Tensor:
    """Read tokens behind what a cache holds; return the logits (n, V) where they are wanted.

    `mask` is over the cache and these tokens.
    """
    if isinstance(cache, Apart):
        return cache.read(base, pool, mix, batch, keep_BS)
    with pool.mixing(mix):
        return logits_at(
            base.model,
            batch.to(base.device),
            keep_BS.to(base.device),
            attention_mask=mask.to(base.device),
            past_key_values=cache,
            use_cache=True,
        )


def _branching(past_BS: Tensor, branch_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to the attention scores (B, 1, S, past + S): 0 for what may be seen.

    A token sees the past of its sequence, itself and what is before it in its own branch.
    """
    size = branch_BS.shape[1]
    causal_SS = torch.ones(size, size, dtype=torch.bool, device=branch_BS.device).tril()
    own_BSS = (branch_BS[:, :, None] == branch_BS[:, None, :]) & causal_SS
    past_BSS = past_BS[:, None, :].bool().expand(-1, size, -1)
    sees_BSS = torch.cat([past_BSS, own_BSS], -1)
    mask_BSS = torch.zeros(sees_BSS.shape, dtype=dtype, device=branch_BS.device)
    return mask_BSS.masked_fill_(~sees_BSS, torch.finfo(dtype).min)[:, None]


def _new_cache(base: Base, num_rows: int) -> Cache:
    if reads_apart(base.model):
        return Apart(num_rows)
    return DynamicCache(config=base.model.config)


def _knows_masks(base: Base, cache: Cache) -> bool:
    """Tell whether masks and positions alone decide what a token of the model sees.

    So it is in models of transformers' common attention interface, without a sliding window;
    others go by places in the cache.
    """
    return base.model._supports_attention_backend and _is_plain(cache)


def _is_plain(cache: Cache) -> bool:
    """Tell whether a cache is of keys and values of all tokens, and no more."""
    return isinstance(cache, DynamicCache) and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


def _copied(cache: Cache) -> Cache:
    """Copy a cache so that what follows does not change it; tensors are shared until then."""
    if isinstance(cache, Apart):
        return cache.copy()
    twin = copy.copy(cache)
    twin.layers = [
        copy.copy(layer) if isinstance(layer, DynamicLayer) else copy.deepcopy(layer)
        for layer in cache.layers  # others, of linear attention, are changed in place
    ]
    return twin


def _layers(cache: Cache) -> list[Any]:
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
