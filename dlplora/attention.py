"""How a model attends on a device: by which implementation of transformers, and under which masks.

Shapes: B rows, S new tokens, T tokens in the cache and new ones.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


def implementation_for(device: torch.device, *, trains: bool) -> str:
    """Return the name of transformers' attention for a device and a use.

    Measured on a CPU (docs/log.md): "eager" trains short prompts faster, because the fused
    attention has a slow backward pass there; "sdpa" reads and writes faster. Elsewhere eager scores
    would take memory by the square of the length in every layer: "sdpa" for all.
    """
    return "eager" if trains and device.type == "cpu" else "sdpa"


def is_plain(cache: object) -> bool:
    """Tell whether a cache is of keys and values of all tokens, and no more."""
    return isinstance(cache, DynamicCache) and all(
        type(layer) is DynamicLayer for layer in cache.layers
    )


def knows_masks(model: Any, cache: object) -> bool:
    """Tell whether masks and positions alone decide what a token of the model sees.

    So it is in models of transformers' common attention interface, without a sliding window and
    without rotary embeddings that change with the length; others go by places in the cache, or by
    how many tokens are read at once.
    """
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    types = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
    is_fixed = types.isdisjoint({"longrope", "dynamic"})
    return is_fixed and bool(model._supports_attention_backend) and is_plain(cache)


def mask_for(model: Any, cache: object, mask_BT: Tensor, num_new: int) -> Tensor:
    """Return a mask of real tokens (B, T) as the model takes it on its device.

    On a CPU that is the mask itself, from which transformers chooses the fastest kernel. It looks
    at the values for that, and elsewhere each look would stop the host until the device is done:
    there, what each of the `num_new` tokens sees is written out (B, 1, S, T). A model that does not
    know masks gets the mask itself everywhere.
    """
    device = model.device
    mask_BT = mask_BT.to(device)
    if device.type == "cpu" or not knows_masks(model, cache):
        return mask_BT
    return written_out(mask_BT, num_new, model.dtype)


def written_out(mask_BT: Tensor, num_new: int, dtype: torch.dtype) -> Tensor:
    """Return what to add to the scores (B, 1, S, T) of the last tokens, which see no later ones."""
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    is_behind_ST = places_T <= places_T[-num_new:, None]
    return additive(is_behind_ST & mask_BT[:, None].bool(), dtype)


def additive(sees_BST: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to attention scores (B, 1, S, T): 0 for what a token sees."""
    mask_BST = torch.zeros(sees_BST.shape, dtype=dtype, device=sees_BST.device)
    return mask_BST.masked_fill_(~sees_BST, torch.finfo(dtype).min)[:, None]
