"""LoRA adapters that were trained elsewhere, made a task's adapter after close inspection."""

import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dlplora.adapters import (
    LoraPair,
    WholeAdapter,
    lora_pairs,
    peft_tensors,
    read_adapter_config,
    read_adapter_tensors,
)
from dlplora.errors import AdapterError, ModelError
from dlplora.records.base_card import BaseCard, read_base_card
from dlplora.records.files import check_no_pointers
from dlplora.records.training import ADAPTER_WEIGHTS, read_checked_training

# What GGUF files add to the name of the model that they hold.
_QUANTISATION = re.compile(r"[.-](I?Q\d\w*|F16|F32|BF16|gguf)$", re.IGNORECASE)
# First values of PEFT's LoRA that are taken out of the base model's weights; also pissa_niter_4.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def import_adapter(folder: Path, *, task: str, base: Path) -> WholeAdapter:
    """Read a PEFT LoRA folder made elsewhere as the adapter of a task.

    Raises `AdapterError` if it was made for another base model, by its name or the shapes of
    its layers, or holds what cannot be fused: DoRA, biases, whole modules, other kinds.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise AdapterError(
            f"{folder}: found no {ADAPTER_WEIGHTS}; expected PEFT's folder of a LoRA adapter "
            f"(weights in other formats are not read: they can hold code)"
        )
    check_no_pointers(folder)
    card = read_base_card(base)
    config = read_adapter_config(folder)
    _check_base(folder, config, card)
    _check_start(folder, config)
    tensors = read_adapter_tensors(folder)
    pairs = lora_pairs(folder, config, tensors)
    if not pairs:
        raise AdapterError(f"{folder}: {ADAPTER_WEIGHTS} holds no LoRA matrices")
    shapes = _layer_shapes(base)
    if rule := _prefix_rule(pairs, shapes):
        moved = {_moved(module, *rule): pair for module, pair in pairs.items()}
        config = {**config, "target_modules": sorted(moved)}
        tensors = peft_tensors(moved)
        pairs = _with_same_scalings(folder, pairs, lora_pairs(folder, config, tensors))
    is_transposed = bool(config.get("fan_in_fan_out"))  # GPT-2 stores (inputs, outputs)
    _check_shapes(folder, pairs, shapes, is_transposed=is_transposed)
    return WholeAdapter.untrained(
        config,
        tensors,
        task=task,
        base_id=card.id,
        base_fingerprint=card.fingerprint,
        is_imported=True,
    )


def _check_base(folder: Path, config: Mapping[str, Any], card: BaseCard) -> None:
    """Compare fingerprints if the folder has one, else the models' names."""
    if (folder / "training.json").is_file():
        made_on = read_checked_training(folder).base_fingerprint
        if made_on != card.fingerprint:
            raise AdapterError(
                f"{folder}: trained on the base model {made_on[:12]}, the one here is "
                f"{card.fingerprint[:12]} ({card.id})"
            )
        return
    made_for = str(config.get("base_model_name_or_path") or "")
    if _plain_name(made_for) != _plain_name(card.id):
        raise AdapterError(
            f"{folder}: made for the base model {made_for or 'without a name'!r}, the one here is "
            f"{card.id!r}; if both have the same weights, write the latter into "
            f"adapter_config.json as base_model_name_or_path"
        )


def _check_start(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse matrices that belong to a base model whose weights their first values changed."""
    start = str(config.get("init_lora_weights"))
    if start.startswith(_CHANGE_BASE):
        raise AdapterError(
            f"{folder}: init_lora_weights is {start!r}, which also changes the base model; "
            f"save it as plain LoRA by PEFT's path_initial_model_for_weight_conversion"
        )


def _plain_name(identity: str) -> str:
    """Return the last part of a model's name or path, without what tells its number format."""
    name = identity.rstrip("/").rpartition("/")[2].casefold()
    while match := _QUANTISATION.search(name):
        name = name[: match.start()]
    return name


def _layer_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight matrix of a base model, without loading them."""
    shapes = {}
    for file in sorted(base.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    shape = tuple(tensors.get_slice(name).get_shape())
                    shapes[name.removesuffix(".weight")] = shape
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read as safetensors: {error}") from error
    return shapes


def _prefix_rule(
    pairs: Mapping[str, LoraPair], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, str] | None:
    """Return the one way to change the beginning of all paths so that the base has such layers.

    The parts of multimodal models have other paths than the language model alone. Returns None if
    nothing has to be changed, or if no way or several ways fit.
    """
    if all(module in shapes for module in pairs):
        return None
    first, *_ = pairs
    fitting = set()
    for layer in shapes:
        from_end = zip(reversed(first.split(".")), reversed(layer.split(".")), strict=False)
        ending = ""
        for part, _ in takewhile(lambda pair: pair[0] == pair[1], from_end):
            ending = f".{part}{ending}"
        ours, theirs = f".{first}".removesuffix(ending), f".{layer}".removesuffix(ending)
        is_of_layers = re.search(r"\.\d", ours + theirs)  # not to another layer's place
        if ending and not is_of_layers and _fits(pairs, shapes, ours, theirs):
            fitting.add((ours, theirs))
    return fitting.pop() if len(fitting) == 1 else None


def _fits(
    pairs: Mapping[str, LoraPair], shapes: Mapping[str, tuple[int, ...]], ours: str, theirs: str
) -> bool:
    return all(
        f".{module}".startswith(f"{ours}.")
        and sorted(shapes.get(_moved(module, ours, theirs), ()))
        == sorted((pair.up_OR.shape[0], pair.down_RI.shape[1]))
        for module, pair in pairs.items()
    )


def _moved(module: str, ours: str, theirs: str) -> str:
    return (theirs + f".{module}".removeprefix(ours)).removeprefix(".")


def _with_same_scalings(
    folder: Path, before: Mapping[str, LoraPair], after: dict[str, LoraPair]
) -> dict[str, LoraPair]:
    """Return the pairs of new paths; `AdapterError` if a pattern of the old ones is lost."""
    scalings = [[pair.scaling for pair in pairs.values()] for pairs in (before, after)]
    if scalings[0] != scalings[1]:
        raise AdapterError(
            f"{folder}: alpha_pattern names layers by other paths than the base model's; save the "
            f"adapter by paths such as {next(iter(after))}"
        )
    return after


def _check_shapes(
    folder: Path,
    pairs: Mapping[str, LoraPair],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    is_transposed: bool,
) -> None:
    for module, pair in pairs.items():
        up, down = tuple(pair.up_OR.shape), tuple(pair.down_RI.shape)
        found = (up[0], down[1])
        expected = shapes.get(module)
        if expected is None:
            raise AdapterError(f"{folder}: the base model has no layer {module}")
        if (found[::-1] if is_transposed else found) != expected:
            raise AdapterError(
                f"{folder}: {module} maps {found[1]} to {found[0]}; "
                f"the base model's weight is {' × '.join(map(str, expected))}"
            )
