"""The log-likelihood of options as answers to prompts that were read.

Shapes: B sequences, S tokens, m picked of n places.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dlplora.attention import additive, knows_masks
from dlplora.data.batches import pad_right
from dlplora.engine import cache as caches
from dlplora.engine import grouping
from dlplora.engine.batch import Batch, read_into
from dlplora.records.scores import OptionScores


@torch.inference_mode()
def score_options(batch: Batch, options: Sequence[Sequence[str]]) -> list[OptionScores]:
    """Return the log-likelihood of each option after its sequence of a batch, which stays.

    The keys and values of a sequence are reused for all of its options, which stand behind it side
    by side, none seeing the others; an option's first token is predicted by the sequence alone.
    """
    rows = [(place, text) for place, texts in enumerate(options) for text in texts]
    if not rows:
        return []
    ids = [batch.base.chat.answer(text) for _, text in rows]
    owners = [place for place, _ in rows]
    firsts = [tokens[0] for tokens in ids]
    found = [_picked(batch.logits_BV.log_softmax(-1), firsts, rows=owners)]
    longer = [number for number, tokens in enumerate(ids) if len(tokens) > 1]
    scored = list(range(len(ids)))  # whose tokens the log-probabilities are
    for part in _parts(batch, longer, owners, ids):
        flat = [number for _, branches in part for number in branches]
        scored += [number for number in flat for _ in ids[number][1:]]
        found.append(
            _score_rest(
                batch,
                [owner for owner, _ in part],
                [[ids[number] for number in branches] for _, branches in part],
            )
        )
    sums = _sums(scored, torch.cat(found).tolist(), len(ids))
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


def _sums(scored: Sequence[int], logprobs: Sequence[float], count: int) -> list[float]:
    """Add up the log-probabilities of each option's tokens, the first token last."""
    rests = [0.0] * count
    for number, logprob in zip(scored[count:], logprobs[count:], strict=True):
        rests[number] += logprob
    return [first + rest for first, rest in zip(logprobs[:count], rests, strict=True)]


def _picked(logprobs_nV: Tensor, tokens: Sequence[int], *, rows: Sequence[int]) -> Tensor:
    """Return the log-probabilities (m,) of tokens in these rows, as float64."""
    rows_m, tokens_m = torch.tensor([list(rows), list(tokens)], device=logprobs_nV.device)
    return logprobs_nV[rows_m, tokens_m].double()


def _parts(
    batch: Batch, numbers: Sequence[int], owners: Sequence[int], ids: Sequence[Sequence[int]]
) -> Iterator[list[tuple[int, list[int]]]]:
    """Cut options into parts that a device takes in one pass: sequences with options.

    One that stands alone may be longer. Where a model knows no masks but its own, each option is a
    row of its own.
    """
    most = grouping.limits_of(batch.base.device).option_tokens
    side_by_side = knows_masks(batch.base.model, batch.cache)
    part: list[tuple[int, list[int]]] = []
    widest = 0
    for number in numbers:
        size = len(ids[number]) - 1
        joins = side_by_side and part and part[-1][0] == owners[number]
        width = size + (sum(len(ids[other]) - 1 for other in part[-1][1]) if joins else 0)
        num_rows = len(part) + (not joins)
        if part and num_rows * max(widest, width) > most:
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
    batch: Batch, owners: Sequence[int], branches: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    """Return the log-probabilities (n,) of the tokens after the first of each option."""
    read = [[token for ids in own for token in ids[:-1]] for own in branches]
    padded = pad_right(read, batch.base.chat.pad_id)
    places_BS, branch_BS = torch.zeros_like(padded.ids_BS), torch.full_like(padded.ids_BS, -1)
    for row, own in enumerate(branches):
        lengths = [len(ids) - 1 for ids in own]
        size = sum(lengths)
        places_BS[row, :size] = torch.cat([torch.arange(length) for length in lengths])
        branch_BS[row, :size] = torch.arange(len(own)).repeat_interleave(torch.tensor(lengths))
    past_BS = batch.mask_BS[owners]
    if max(map(len, branches)) > 1:
        device = batch.base.device
        mask = _branching(past_BS.to(device), branch_BS.to(device), batch.base.model.dtype)
    else:
        mask = torch.cat([past_BS, padded.mask_BS], 1)
    start_B1 = batch.positions_B[owners][:, None] + 1
    cache = caches.copied(batch.cache)
    caches.select(cache, owners, batch.base.device)
    logits_nV = read_into(
        cache,
        batch.base,
        batch.layers,
        batch.mix.select(owners),
        replace(padded, positions_BS=places_BS + start_B1),
        padded.mask_BS.bool(),
        mask=mask,
    )
    targets = [token for own in branches for ids in own for token in ids[1:]]
    return _picked(logits_nV.float().log_softmax(-1), targets, rows=range(len(targets)))


def _branching(past_BS: Tensor, branch_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to the attention scores (B, 1, S, past + S): 0 for what may be seen.

    A token sees the past of its sequence, itself and what is before it in its own branch.
    """
    size = branch_BS.shape[1]
    causal_SS = torch.ones(size, size, dtype=torch.bool, device=branch_BS.device).tril()
    own_BSS = (branch_BS[:, :, None] == branch_BS[:, None, :]) & causal_SS
    past_BSS = past_BS[:, None, :].bool().expand(-1, size, -1)
    return additive(torch.cat([past_BSS, own_BSS], -1), dtype)
