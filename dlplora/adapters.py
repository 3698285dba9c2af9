"""LoRA adapters in PEFT's folder format: read without PEFT, written with equal bytes."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlplora.errors import AdapterError
from dlplora.records.files import written_folder
from dlplora.records.training import (
    ADAPTER_WEIGHTS,
    AdapterTraining,
    Curve,
    read_checked_training,
    write_adapter_training,
)
from dlplora.words import is_number

_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Settings of PEFT's LoRA that change its forward pass beyond B A x, by the value that does not.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, {}, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "velora_config": (None, {}),
}


@dataclass(frozen=True)
class LoraPair:
    """The two matrices of one linear layer, A (R, I) and B (O, R), and their scaling."""

    down_RI: Tensor
    up_OR: Tensor
    scaling: float


@dataclass(frozen=True)
class LoraAdapter:
    """One task's adapter: a pair for each linear layer that it changes, by module path."""

    name: str
    pairs: Mapping[str, LoraPair]


def read_adapter(folder: Path, *, base_fingerprint: str) -> LoraAdapter:
    """Read an adapter folder; its name is the task's.

    Raises `AdapterError` if it was trained on another base model, holds anything that is not
    a plain low-rank pair of a linear layer, was changed since, or cannot be read.
    """
    training = read_checked_training(folder)
    if training.base_fingerprint != base_fingerprint:
        raise AdapterError(
            f"{folder}: trained on the base model {training.base_fingerprint[:12]}, "
            f"the one in use is {base_fingerprint[:12]}; train it again"
        )
    config = read_adapter_config(folder)
    return LoraAdapter(folder.name, lora_pairs(folder, config, read_adapter_tensors(folder)))


def read_adapters(folders: Iterable[Path], *, base_fingerprint: str) -> list[LoraAdapter]:
    """Read adapter folders, in their order, as `read_adapter` does."""
    return [read_adapter(folder, base_fingerprint=base_fingerprint) for folder in folders]


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read PEFT's adapter_config.json; `AdapterError` if it is no plain LoRA."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: cannot be read: {error}") from error
    if not isinstance(config, dict) or not is_number(config.get("lora_alpha")):
        raise AdapterError(f"{file}: not the configuration of a LoRA adapter (no lora_alpha)")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(is_number, patterns.values())):
        raise AdapterError(f"{file}: alpha_pattern is {patterns!r}, expected numbers by pattern")
    for key, plain in _PLAIN.items():
        if key in config and config[key] not in plain:
            raise AdapterError(f"{folder}: {key} is {config[key]!r}; only plain LoRA can be fused")
    return config


def lora_pairs(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, LoraPair]:
    """Pair the matrices of an adapter by module path; `AdapterError` on anything else."""
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _WEIGHT.fullmatch(name)
        if match is None:
            raise AdapterError(f"{folder}: the tensor {name} is no LoRA matrix of a linear layer")
        if not tensor.isfinite().all():
            raise AdapterError(f"{folder}: the tensor {name} holds values that are not finite")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    for module, pair in sides.items():
        if len(pair) != 2:
            raise AdapterError(f"{folder}: {module} has only one of lora_A and lora_B")
        down, up = tuple(pair["A"].shape), tuple(pair["B"].shape)
        if not len(down) == len(up) == 2 or not down[0] == up[1] > 0:
            raise AdapterError(
                f"{folder}: {module} has a lora_A of {_size(down)} and a lora_B of {_size(up)}, "
                f"which are no pair"
            )
    return {
        module: LoraPair(pair["A"], pair["B"], _scaling(config, module, pair["A"].shape[0]))
        for module, pair in sorted(sides.items())
    }


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the weights of an adapter's folder; `AdapterError` if they cannot be read."""
    file = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file}: cannot be read as safetensors: {error}") from error


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "no dimensions"


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / r, or alpha / √r for rsLoRA, with PEFT's alpha patterns."""
    alpha: float = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise AdapterError(
                f"the alpha_pattern {pattern!r} is no expression: {error}"
            ) from error
        if found:
            alpha = value
            break
    return alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank


@dataclass(frozen=True)
class WholeAdapter:
    """All that stands in an adapter's folder: PEFT's configuration and tensors, and its training.

    The base is named by `base_id`.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    base_id: str
    training: AdapterTraining

    @classmethod
    def untrained(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        task: str,
        base_id: str,
        base_fingerprint: str,
        is_imported: bool = False,
    ) -> "WholeAdapter":
        """Return one that was imported, or composed of others: nothing is known but its size."""
        training = AdapterTraining(
            task=task,
            base_fingerprint=base_fingerprint,
            is_imported=is_imported,
            data_sha256=None,
            num_examples=0,
            num_parameters=sum(tensor.numel() for tensor in tensors.values()),
            longest_answer_tokens=0,
            kernels=(),
            curve=Curve((), 0),
        )
        return cls(config, tensors, base_id, training)

    def save(self, folder: Path) -> None:
        """Write PEFT's folder and training.json."""
        with written_folder(folder) as aside:
            write_adapter(aside, self.config, self.tensors, base_id=self.base_id)
            write_adapter_training(aside, self.training)


def peft_tensors(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """Name the matrices of an adapter as PEFT's files do."""
    return {
        f"base_model.model.{path}.lora_{side}.weight": tensor
        for path, pair in pairs.items()
        for side, tensor in (("A", pair.down_RI), ("B", pair.up_OR))
    }


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, base_id: str
) -> None:
    """Write PEFT's two files so that equal adapters have equal bytes.

    PEFT writes sets in random order and the path of the base: here lists are sorted and the
    base is named by its id.
    """
    sorted_config = {
        key: sorted(value)
        if isinstance(value, set | list) and key != "layer_replication"
        else value
        for key, value in sorted(config.items())
    }
    sorted_config |= {"base_model_name_or_path": base_id, "inference_mode": True}
    text = json.dumps(sorted_config, indent=2, sort_keys=True, default=str)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    whole = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(whole, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
