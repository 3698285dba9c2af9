"""Attention within a pack: softmax(q kᵀ · s + mask) v for each row, without padding.

The heads that share keys and values (arXiv 2305.13245) are rows of one product. All scores of a
block are in memory at once, which suits a CPU and short prompts. A model calls it if transformers'
common attention interface passes the keyword `packed` of its forward on; without the keyword it
attends as it always does.

Shapes: as in `pack`; n wanted places, D width of a head, V entries of the vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding
from transformers import PreTrainedConfig

from dlplora.data.batches import Padded
from dlplora.kernels.autograd import apply
from dlplora.kernels.hooks import without_hooks
from dlplora.kernels.pack import Block, Pack
from dlplora.models import inner_model, logits_at, num_embeddings, reads_apart
from dlplora.runtime import is_out_of_memory

NAME = "ALL_ATTENTION_FUNCTIONS"  # transformers' attention interface, in each file of a family
# What transformers passes to every attention and a pack determines by itself.
_PASSED = {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions"}


def reference(
    query_1HND: Tensor,
    key_1KND: Tensor,
    value_1KND: Tensor,
    pack: Pack,
    *,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Return the answers (1, N, H, D) by one softmax over the pack, most of it masked."""
    rows_N = torch.tensor(
        [-1] * pack.num_shared + [row for row, size in enumerate(pack.lengths) for _ in range(size)]
    )
    positions_N = torch.tensor(pack.positions)
    distances_NN = positions_N[:, None] - positions_N
    sees_NN = (rows_N[:, None] == rows_N) | (rows_N == -1)
    sees_NN &= (distances_NN >= 0) & (window is None or distances_NN < window)
    groups = query_1HND.shape[1] // key_1KND.shape[1]
    key, value = (part.repeat_interleave(groups, 1) for part in (key_1KND, value_1KND))
    scores = (query_1HND @ key.mT * scaling).masked_fill(~sees_NN, -torch.inf)
    return (scores.softmax(-1, torch.float32).to(value.dtype) @ value).transpose(1, 2)


def attend_packed(
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Sequence[Block],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **passed: Any,
) -> tuple[Tensor, None]:
    """Attend within a pack, as a function of transformers' attention interface.

    Raises `NotImplementedError` if the model asks for more than softmax(q kᵀ · s + mask) v.
    """
    asked = {name for name, one in passed.items() if one is not None} - _PASSED
    if dropout or asked:
        raise NotImplementedError(f"attention with {', '.join(sorted(asked)) or 'dropout'}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return apply(PackedAttention, query, key, value, packed, scaling, sliding_window), None


class PackedInterface:
    """Transformers' attention interface, whose functions also take packs."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __getitem__(self, name: str) -> Any:
        return self._own[name]

    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        """Return the attention function of this name, which is the own one without a pack."""
        own = self._own.get_interface(name, default)

        def attend(*given: Any, packed: Sequence[Block] | None = None, **named: Any) -> Any:
            if packed is None:
                return own(*given, **named)
            return attend_packed(*given, packed=packed, **named)

        return attend


def packed_logits(model: nn.Module, pack: Pack, keep_N: Tensor) -> Tensor:
    """Return the logits (n, V) at the n places of a pack where `keep_N` is true."""
    first = next(model.parameters())
    ids_1N, positions_1N = torch.tensor([pack.ids]), torch.tensor([pack.positions])
    # A mask of four dimensions keeps transformers from making one; this one takes no memory.
    # Attention that does not know packs adds it: its logits are NaN, not silently wrong.
    mask_11NN = first.new_full((), torch.nan).expand(1, 1, len(pack.ids), len(pack.ids))
    return logits_at(
        model,
        Padded(ids_1N, torch.ones_like(ids_1N), positions_1N),
        keep_N[None],
        attention_mask=mask_11NN,
        use_cache=False,
        packed=pack.blocks,
    )


# Shares of the vocabulary: three short rows with a shared prefix, and others beside the second.
_SHARED, _ROW = (0.1, 0.9, 0.4), (0.7, 0.2, 0.6)
_OTHERS, _CHANGED = ((0.3,), (0.8, 0.5)), ((0.8,), (0.5, 0.3))
_GAP = 0.1  # of the logits' norm; bfloat16 is about 0.01 off


def takes_packs(model: nn.Module) -> bool:
    """Tell whether a model with the interface for packs computes each row as if it were alone.

    The logits of one row must be those that the model's own attention gives it alone, up to
    rounding, and must not change by a single bit if the other rows do. A model fails if its
    attention drops, caps or biases scores, or if tokens see each other outside of attention. These
    rows are too short for sliding windows: attention must be told those of the configuration.
    """
    inner = inner_model(model)
    if reads_apart(inner):
        return False
    size, windows = num_embeddings(inner), set[int | None]()

    def logits(first: Sequence[float], last: Sequence[float]) -> Tensor:
        shared, *own = [[int(x * size) for x in row] for row in (_SHARED, first, _ROW, last)]
        pack = Pack.of(shared, own)
        keep_N = torch.zeros(len(pack.ids), dtype=torch.bool)
        keep_N[len(shared) + len(first) :][: len(_ROW)] = True
        found = packed_logits(model, pack, keep_N)
        windows.update(*(block.windows for block in pack.blocks))
        return found

    with torch.random.fork_rng(devices=[]), torch.no_grad(), without_hooks(model):
        try:
            with _mode(model, training=False):
                ids_1S = torch.tensor([[int(x * size) for x in (*_SHARED, *_ROW)]])
                output: Any = model(input_ids=ids_1S, use_cache=False)
                alone_SV, found_SV, changed_SV = (
                    output.logits[0, len(_SHARED) :],
                    logits(*_OTHERS),
                    logits(*_CHANGED),
                )
            with _mode(model, training=True):
                logits(*_OTHERS)
        except Exception as error:  # the model does not know the keyword, or needs more than packs
            if is_out_of_memory(error):
                raise
            return False
    gap = (found_SV - alone_SV).norm() / alone_SV.norm()
    return (
        bool(gap < _GAP)  # nor NaN
        and torch.equal(found_SV, changed_SV)
        and windows == _windows_of(inner.config.get_text_config(decoder=True))
    )


def _windows_of(config: PreTrainedConfig) -> set[int | None]:
    """Return the sliding windows of a model's layers, None for layers without one."""
    is_off = getattr(config, "use_sliding_window", True) is False
    window = None if is_off else getattr(config, "sliding_window", None) or None
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    return {window if layer == "sliding_attention" else None for layer in layers}


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model into a mode in the block."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


class PackedAttention(torch.autograd.Function):
    """What `reference` computes, block by block; the gradient reaches the vectors."""

    @staticmethod
    def forward(
        ctx: Any,
        query_1HND: Tensor,
        key_1KND: Tensor,
        value_1KND: Tensor,
        blocks: Sequence[Block],
        scaling: float,
        window: int | None,
    ) -> Tensor:
        heads, keys, width = query_1HND.shape[1], key_1KND.shape[1], query_1HND.shape[3]
        vectors = [_by_token(part) for part in (query_1HND, key_1KND, value_1KND)]
        answers, kept = [], []
        for block in blocks:
            places = block.places(heads, keys)
            groups = block.num_rows * keys
            query = embedding(places.queries_BKGS, vectors[0]).view(groups, -1, width)
            key = embedding(places.keys_BKT, vectors[1]).view(groups, -1, width)
            value = embedding(places.keys_BKT, vectors[2]).view(groups, -1, value_1KND.shape[3])
            scores = torch.bmm(query.mul_(scaling), key.transpose(1, 2))
            by_head = scores.view(groups, -1, block.width, scores.shape[2])
            by_head += block.mask(window, scores.dtype)
            shares = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
            answer = torch.bmm(shares, value)
            answers.append(embedding(places.answers_nH, answer.view(-1, answer.shape[2])))
            kept += [query, key, value, shares]
        ctx.save_for_backward(*kept)
        ctx.blocks, ctx.scaling, ctx.heads = blocks, scaling, (heads, keys)
        return torch.cat(answers)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_1NHD: Tensor) -> tuple[Tensor | None, ...]:
        heads, keys = ctx.heads
        vectors = gradient_1NHD.reshape(-1, gradient_1NHD.shape[3])
        to_queries: list[Tensor] = []
        to_keys: list[Tensor] = []
        to_values: list[Tensor] = []
        saved = ctx.saved_tensors  # once: gradient checkpointing computes it again at each access
        for number, block in enumerate(ctx.blocks):
            query, key, value, shares = saved[4 * number : 4 * number + 4]
            places = block.places(heads, keys)
            gradient = embedding(places.queries_BKGS, vectors)
            gradient.masked_fill_(block.is_behind_B11S1, 0)
            gradient = gradient.view(*query.shape[:2], -1)
            to_value = torch.bmm(shares.transpose(1, 2), gradient)
            to_shares = torch.bmm(gradient, value.transpose(1, 2))
            to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype)
            to_query = torch.bmm(to_scores, key).mul_(ctx.scaling)
            to_key = torch.bmm(to_scores.transpose(1, 2), query)
            to_queries.append(embedding(places.answers_nH, to_query.view(-1, query.shape[2])))
            for parts, found in ((to_keys, to_key), (to_values, to_value)):
                if block.before:  # what the prefix, which is the block before, gets of each row
                    by_row = found.view(block.num_rows, keys, *found.shape[1:])
                    parts[0] += by_row[:, :, : block.before].sum(0).transpose(0, 1)
                parts.append(embedding(places.own_keys_nK, found.view(-1, found.shape[2])))
        to_query, to_key, to_value = (
            torch.cat(parts).transpose(0, 1)[None] for parts in (to_queries, to_keys, to_values)
        )
        return to_query, to_key, to_value, None, None, None


def _by_token(vectors_1HND: Tensor) -> Tensor:
    """Return the vectors of all heads token after token, (N × H, D)."""
    return vectors_1HND[0].transpose(0, 1).reshape(-1, vectors_1HND.shape[3])
