"""Adapter folders: what PEFT reads back, what is refused, and equal bytes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from dlplora.adapters import _PLAIN, read_adapter, write_adapter
from dlplora.errors import AdapterError
from tests.device import on_device
from tests.peft_adapters import FINGERPRINT, peft_model, save_peft
from tests.tiny import tiny_model

IDS = on_device([[5, 6, 7, 8]])


def test_plain_peft_loads_the_folder_and_gives_the_same_logits(tmp_path: Path) -> None:
    model = peft_model(tiny_model(), seed=1, r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    save_peft(model, tmp_path / "mine")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "mine").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_equal_adapters_have_equal_bytes_whatever_the_order_of_sets(tmp_path: Path) -> None:
    model = peft_model(tiny_model(), seed=1, r=3, target_modules=["q_proj", "v_proj", "k_proj"])
    config = model.peft_config["default"].to_dict()
    tensors = get_peft_model_state_dict(model)
    for name, targets in (
        ("a", ["q_proj", "v_proj", "k_proj"]),
        ("b", ["k_proj", "v_proj", "q_proj"]),
    ):
        (tmp_path / name).mkdir()
        given = config | {
            "target_modules": targets,
            "base_model_name_or_path": f"/somewhere/{name}",
        }
        order = sorted(tensors, reverse=name == "b")
        write_adapter(tmp_path / name, given, {key: tensors[key] for key in order}, base_id="tiny")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    save_peft(peft_model(tiny_model(), seed=1, r=2, target_modules=["q_proj"]), tmp_path / "mine")
    with pytest.raises(AdapterError, match="mine: trained on the base model ffffffffffff"):
        read_adapter(tmp_path / "mine", base_fingerprint="0" * 64)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("peft_type", "IA3"),
        ("lora_bias", True),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name(key: str, value: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    save_peft(peft_model(tiny_model(), seed=1, r=2, target_modules=["q_proj"]), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(AdapterError, match=f"mine: {key} is"):
        read_adapter(folder, base_fingerprint=FINGERPRINT)


def _cut(weights: bytes) -> bytes:
    return weights[:-100]


def _changed(weights: bytes) -> bytes:
    return weights[:-1] + bytes([weights[-1] ^ 1])


@pytest.mark.parametrize("change", [_cut, _changed])
def test_weights_that_were_cut_or_changed_are_named(
    change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    save_peft(peft_model(tiny_model(), seed=1, r=2, target_modules=["q_proj"]), folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: truncated or changed"):
        read_adapter(folder, base_fingerprint=FINGERPRINT)


# Settings of PEFT's LoRA that leave the forward pass at s B A x, or that are read.
HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode", "revision"),
    *("base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core"),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    *("runtime_config", "ensure_weight_tying"),
}


def test_every_setting_of_peft_is_refused_or_known_to_be_harmless() -> None:
    settings = {field.name for field in dataclasses.fields(LoraConfig)}
    assert settings - HARMLESS == set(_PLAIN) - {"peft_type"}


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": float("nan")},
        {"lora_alpha": "16"},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": None}},
        {"alpha_pattern": {"(": 3}},
    ],
)
def test_a_broken_configuration_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    save_peft(peft_model(tiny_model(), seed=1, r=2, target_modules=["q_proj"]), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match="alpha"):
        read_adapter(folder, base_fingerprint=FINGERPRINT)
