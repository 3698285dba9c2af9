"""All adapters of a pool made one, by PEFT's `add_weighted_adapter`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from dlplora.adapters import LoraAdapter, WholeAdapter, read_adapters
from dlplora.errors import AdapterError, one_line
from dlplora.models import Base
from dlplora.params.training import Merge, PrunedMerge, SvdMerge
from dlplora.training.warnings import ignore_peft_warnings

_MERGED = "merged"
_UP = ".lora_B.weight"


def merge_adapters(
    base: Base, folders: Sequence[Path], *, name: str, params: Merge, seed: int
) -> WholeAdapter:
    """Merge adapter folders into one adapter; DARE draws what it drops by the seed.

    The scalings of the adapters are in the matrices of the merged one, whose own is 1. `cat` and
    `svd` are of the weighted sum Σ w s B A. `linear`, `ties` and `dare_ties` merge the matrices A
    and the matrices B apart, each times √(w s).

    Raises `AdapterError` if an adapter does not fit the base model, if they cannot be merged so –
    by the last three only adapters of equal ranks can –, or if PEFT leaves a layer out.
    """
    adapters = read_adapters(folders, base_fingerprint=base.fingerprint)
    if params.kind in ("linear", "ties", "dare_ties"):
        check_alike(adapters, title=f"merge {name}")
    weight = 1 / len(folders) if params.weights == "mean" else 1.0
    torch.manual_seed(seed)
    try:
        with ignore_peft_warnings():
            model = _with_all(base, folders)
            tuner: Any = model.base_model
            tuner.add_weighted_adapter(
                list(model.peft_config),
                [weight] * len(folders),
                _MERGED,
                combination_type=params.kind,
                svd_rank=params.rank if isinstance(params, SvdMerge) else None,
                density=params.density if isinstance(params, PrunedMerge) else None,
            )
    except (TypeError, ValueError) as error:
        raise AdapterError(f"merge {name}: {one_line(error)}") from error
    tensors = get_peft_model_state_dict(model, adapter_name=_MERGED, save_embedding_layers=False)
    config: dict[str, Any] = model.peft_config[_MERGED].to_dict() | {"use_rslora": False}
    _check_layers(adapters, tensors, rank=config["r"], title=f"merge {name}")
    return WholeAdapter.untrained(
        config, tensors, task=name, base_id=base.id, base_fingerprint=base.fingerprint
    )


def check_alike(adapters: Sequence[LoraAdapter], *, title: str) -> None:
    """Raise `AdapterError` unless all adapters change the same layers, by equal ranks."""
    first = adapters[0]
    for adapter in adapters[1:]:
        if odd := sorted(adapter.pairs.keys() ^ first.pairs.keys()):
            raise AdapterError(
                f"{title}: only one of the adapters {first.name} and {adapter.name} changes "
                f"{odd[0]}; expected the same layers"
            )
        for path, pair in adapter.pairs.items():
            if (found := len(pair.down_RI)) != (expected := len(first.pairs[path].down_RI)):
                raise AdapterError(
                    f"{title}: the adapter {adapter.name} has rank {found} on {path}, "
                    f"{first.name} has {expected}; expected equal ranks"
                )


def _with_all(base: Base, folders: Sequence[Path]) -> PeftModel:
    """Give the base model all adapters, named by numbers: a task's name may be a part of a key.

    It is made float32, for in its dtype PEFT makes the matrices of the merge.
    """
    first, *others = folders
    whole: Any = base.model
    model = PeftModel.from_pretrained(whole.float(), first, adapter_name="adapter_0")
    for number, folder in enumerate(others, start=1):
        model.load_adapter(folder, adapter_name=f"adapter_{number}")
    return model


def _check_layers(
    adapters: Sequence[LoraAdapter], tensors: Mapping[str, Tensor], *, rank: int, title: str
) -> None:
    """Raise `AdapterError` if a merge lacks a layer, or has one whose scaling would not be 1.

    PEFT goes by the first one's configuration, and by one rank for all layers.
    """
    merged = {
        key.removeprefix("base_model.model.").removesuffix(_UP): tensor.shape[1]
        for key, tensor in tensors.items()
        if key.endswith(_UP)
    }
    changed = {path for adapter in adapters for path in adapter.pairs}
    if odd := sorted(changed ^ merged.keys()):
        raise AdapterError(
            f"{title}: PEFT's merge has other layers than the adapters, such as {odd[0]}; expected "
            f"adapters whose configurations name the same layers"
        )
    for path, found in merged.items():
        if found != rank:
            raise AdapterError(
                f"{title}: rank {found} on {path}, its configuration says {rank}; expected a rank "
                f"of at most {found}, the same for all layers"
            )
