"""Random adapters made by PEFT itself, saved as this project saves them."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from dlplora.adapters import LoraAdapter, read_adapter, write_adapter
from dlplora.records.training import AdapterTraining, Curve, write_adapter_training

FINGERPRINT = "f" * 64


def peft_model(model: PreTrainedModel, *, seed: int, **config: Any) -> PeftModel:
    """Give a copy of the model a PEFT adapter whose matrices are all random."""
    torch.manual_seed(seed)
    with_lora = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in with_lora.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return with_lora.eval()


def save_peft(model: PeftModel, folder: Path) -> LoraAdapter:
    """Save a PEFT adapter by this project's writer and read it back."""
    folder.mkdir(parents=True)
    tensors = get_peft_model_state_dict(model)
    write_adapter(folder, model.peft_config["default"].to_dict(), tensors, base_id="tiny")
    write_adapter_training(folder, training_of(folder.name))
    return read_adapter(folder, base_fingerprint=FINGERPRINT)


def training_of(task: str) -> AdapterTraining:
    """Return what is known of how an adapter was trained: nothing."""
    return AdapterTraining(task, FINGERPRINT, False, "", 1, 1, 1, (), Curve((), 0))


def peft_pool(
    model: PreTrainedModel, configs: Mapping[str, Mapping[str, Any]], folder: Path
) -> tuple[dict[str, PeftModel], list[LoraAdapter]]:
    """Make several adapters; return PEFT's models and the adapters read from their folders."""
    models = {
        name: peft_model(model, seed=seed, **config)
        for seed, (name, config) in enumerate(configs.items())
    }
    return models, [save_peft(models[name], folder / name) for name in configs]
