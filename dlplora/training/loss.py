"""What an adapter learns: the mean cross-entropy of the tokens of answers.

The end token is one of them, and no token of a prompt is: the logits at a place predict the
token after it.

Shapes: B rows, S own places, T places with the prefix, N tokens of a pack, n labelled places,
V tokens of the vocabulary.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from dlplora.attention import mask_for
from dlplora.data.batches import pad_right, shared_beginning
from dlplora.data.prompts import ChatFormat
from dlplora.kernels import cross_entropy
from dlplora.kernels.autograd import apply
from dlplora.kernels.choice import Kernel
from dlplora.kernels.pack import Pack
from dlplora.kernels.packed_attention import packed_logits
from dlplora.models import head_at, inner_model, logits_at, reads_apart
from dlplora.training.pairs import Pair


def mean_loss(
    model: nn.Module,
    pairs: Sequence[Pair],
    chat: ChatFormat,
    *,
    ran: Collection[Kernel] = (),
    always_share: bool = False,
) -> Tensor:
    """Return the mean cross-entropy of the answer tokens of a batch.

    The prefix that all prompts of the batch share is computed once, and the gradients of all rows
    sum into it. Dropout would drop the same places of it for all rows: then it is shared only if
    `always_share`. `ran` names the kernels of the `use_kernels` block that the model is in; with
    packed attention nothing is padded. A model that has to read each row by itself does.
    """
    prompts = [pair.prompt for pair in pairs]
    shared = 0
    if always_share or not _has_dropout(model):
        shared = shared_beginning(prompts)
    if reads_apart(inner_model(model)):
        logits_nV = torch.cat([_alone(model, pair) for pair in pairs])
    elif "packed_attention" in ran:
        logits_nV = _packed(model, pairs, shared)
    else:
        logits_nV = _padded(model, pairs, shared, chat)
    targets = [token for pair in pairs for token in pair.answer]
    targets_n = torch.tensor(targets, device=logits_nV.device)
    if "cross_entropy" in ran:
        return apply(cross_entropy.MeanCrossEntropy, logits_nV, targets_n)
    return cross_entropy.reference(logits_nV, targets_n)


def _has_dropout(model: nn.Module) -> bool:
    drops_attention = (getattr(inner_model(model).config, "attention_dropout", None) or 0) > 0
    return model.training and (
        drops_attention
        or any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    )


def _alone(model: nn.Module, pair: Pair) -> Tensor:
    """Return the logits that predict one answer, of a row without padding."""
    row = pair.prompt + pair.answer
    ids_1S = torch.tensor([row], device=next(model.parameters()).device)
    keep_1S = torch.zeros(ids_1S.shape, dtype=torch.bool)
    keep_1S[0, len(pair.prompt) - 1 : -1] = True
    with head_at(model, keep_1S):
        logits: Tensor = model(input_ids=ids_1S, use_cache=False).logits[0]
    return logits


def _packed(model: nn.Module, pairs: Sequence[Pair], shared: int) -> Tensor:
    """Return the logits that predict the answers, of a batch that is one pack."""
    own = [pair.prompt[shared:] + pair.answer for pair in pairs]
    keep = [False] * shared
    for pair, row in zip(pairs, own, strict=True):
        keep += [False] * (len(row) - len(pair.answer) - 1) + [True] * len(pair.answer) + [False]
    pack = Pack.of(pairs[0].prompt[:shared], own)
    return packed_logits(model, pack, torch.tensor(keep))


def _padded(model: nn.Module, pairs: Sequence[Pair], shared: int, chat: ChatFormat) -> Tensor:
    """Return the same logits by padded rows behind a repeated cache of the prefix."""
    rows = [pair.prompt[shared:] + pair.answer for pair in pairs]
    padded = pad_right(rows, chat.pad_id)
    ends_B1 = torch.tensor([[len(row) - 1] for row in rows])
    starts_B1 = ends_B1 - torch.tensor([[len(pair.answer)] for pair in pairs])
    places_S = torch.arange(padded.ids_BS.shape[1])
    keep_BS = (places_S >= starts_B1) & (places_S < ends_B1)

    device = next(model.parameters()).device
    cache = DynamicCache(config=cast(PreTrainedConfig, model.config))
    if shared:
        prefix = pad_right([pairs[0].prompt[:shared]], chat.pad_id).to(device)
        no_logits = torch.zeros(prefix.mask_BS.shape, dtype=torch.bool)
        logits_at(model, prefix, no_logits, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    prefix_mask = torch.ones(len(rows), shared, dtype=padded.mask_BS.dtype)
    mask_BT = torch.cat([prefix_mask, padded.mask_BS], 1)
    batch = dataclasses.replace(padded, positions_BS=padded.positions_BS + shared).to(device)
    return logits_at(
        model,
        batch,
        keep_BS,
        attention_mask=mask_for(inner_model(model), cache, mask_BT, padded.ids_BS.shape[1]),
        past_key_values=cache,
        use_cache=True,
    )
