"""Adapters made elsewhere: plain PEFT's logits after the import, and what is refused why."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlplora.adapters import read_adapter
from dlplora.errors import AdapterError, SourceError
from dlplora.imports import import_adapter
from dlplora.lora.attach import attached
from dlplora.records.base_card import BaseCard, write_base_card
from dlplora.records.routes import Route
from dlplora.records.training import read_adapter_training
from tests.device import on_device
from tests.peft_adapters import peft_model, save_peft
from tests.tiny import FRAME, TARGETS, tiny_model

IDS = on_device([[5, 6, 7, 8], [9, 10, 11, 12]])
FINGERPRINT = "e" * 64
WEIGHTS = "adapter_model.safetensors"
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return _write_base(tmp_path / "base")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder as plain PEFT saves it."""
    _save(tmp_path / "plain")
    return tmp_path / "plain"


def _write_base(folder: Path, kind: str = "llama") -> Path:
    tiny_model(kind).save_pretrained(folder)
    write_base_card(folder, BaseCard("pack==1.0/tiny.Q4_1", FINGERPRINT, FRAME, None, False))
    return folder


def _save(folder: Path, kind: str = "llama", *, hidden: int = 16, **config: Any) -> PeftModel:
    model = tiny_model(kind, hidden=hidden)
    model.name_or_path = "org/tiny"
    settings = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[kind]} | config
    with_lora = peft_model(model, seed=1, **settings)
    with_lora.save_pretrained(str(folder), save_embedding_layers=False)
    return with_lora


def _imported(folder: Path, base: Path) -> Path:
    out = folder.parent / "adapters/mine"
    import_adapter(folder, task="mine", base=base).save(out)
    return out


def _refusal(folder: Path, base: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        import_adapter(folder, task="mine", base=base)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    return str(caught.value)


def _edit_config(folder: Path, **values: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _fused_logits(folder: Path, kind: str) -> Tensor:
    model = tiny_model(kind)
    adapter = read_adapter(folder, base_fingerprint=FINGERPRINT)
    with attached(model, [adapter]) as pool:
        routes = [Route(("mine",), (1.0,))] * len(IDS)
        with pool.mixing(pool.mix(routes)):
            logits: Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("qwen2", {"use_rslora": True}),
        ("llama", {"use_rslora": True, "lora_alpha": 16}),
        ("gpt2", {"fan_in_fan_out": True}),
        ("llama", {"rank_pattern": {"0.*q_proj": 6}, "alpha_pattern": {"v_proj": 1.5}}),
        ("llama", {"use_rslora": True, "alpha_pattern": {"1.*v_proj": 9}}),
        ("llama", {"target_modules": "all-linear"}),
    ],
)
def test_an_imported_adapter_gives_the_logits_of_plain_peft(
    tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    plain = _save(tmp_path / "plain", kind, **config)
    out = _imported(tmp_path / "plain", _write_base(tmp_path / "base", kind))
    expected = plain(IDS).logits
    torch.testing.assert_close(_fused_logits(out, kind), expected, atol=1e-4, rtol=1e-4)
    merged = PeftModel.from_pretrained(tiny_model(kind), str(out)).merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, tiny_model(kind)(IDS).logits, atol=1e-2)


def test_an_adapter_in_half_precision_is_imported_in_float32(plain: Path, base: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}

    _edit_tensors(plain, halve)
    out = _imported(plain, base)
    for name, tensor in load_file(plain / WEIGHTS).items():
        assert torch.equal(load_file(out / WEIGHTS)[name], tensor.float())


def test_importing_twice_gives_equal_bytes(plain: Path, base: Path) -> None:
    first = {file.name: file.read_bytes() for file in _imported(plain, base).iterdir()}
    second = {file.name: file.read_bytes() for file in _imported(plain, base).iterdir()}
    assert first == second
    assert set(first) == {"adapter_config.json", WEIGHTS, "training.json"}


def test_the_training_says_that_nothing_is_known_of_it(plain: Path, base: Path) -> None:
    training = read_adapter_training(_imported(plain, base))
    assert (training.task, training.is_imported) == ("mine", True)
    assert training.base_fingerprint == FINGERPRINT
    sizes = [tensor.numel() for tensor in load_file(plain / WEIGHTS).values()]
    assert training.num_parameters == sum(sizes)
    assert (training.num_examples, training.curve.points) == (0, ())


def test_an_adapter_of_this_project_is_told_by_its_fingerprint(tmp_path: Path) -> None:
    model = peft_model(tiny_model(), seed=1, r=2, target_modules=["q_proj"])
    save_peft(model, tmp_path / "own")  # trained on the fingerprint fff…
    base = _write_base(tmp_path / "base")
    message = _refusal(tmp_path / "own", base)
    assert "trained on the base model ffffffffffff, the one here is eeeeeeeeeeee" in message
    write_base_card(base, BaseCard("renamed", "f" * 64, FRAME, None, False))
    import_adapter(tmp_path / "own", task="mine", base=base)


@pytest.mark.parametrize(
    "name",
    ["tiny", "Tiny", "a/b/tiny/", "org/tiny.Q4_1", "tiny-Q4_K_M.gguf", "tiny.f16", "tiny-IQ2_XS"],
)
def test_names_of_the_same_model_in_other_formats_count_as_one(
    plain: Path, base: Path, name: str
) -> None:
    _edit_config(plain, base_model_name_or_path=name)
    import_adapter(plain, task="mine", base=base)


@pytest.mark.parametrize("name", ["org/tiny-2", "tiny/other", "tinyQ4", "", None])
def test_another_base_model_is_refused_by_name(plain: Path, base: Path, name: str | None) -> None:
    _edit_config(plain, base_model_name_or_path=name)
    message = _refusal(plain, base)
    assert f"made for the base model {name or 'without a name'!r}" in message
    assert "the one here is 'pack==1.0/tiny.Q4_1'" in message
    assert "base_model_name_or_path" in message


def test_matrices_of_another_size_are_refused(tmp_path: Path, base: Path) -> None:
    _save(tmp_path / "wide", hidden=32)
    message = _refusal(tmp_path / "wide", base)
    assert "q_proj maps 32 to 32; the base model's weight is 16 × 16" in message


def test_a_layer_that_the_base_model_lacks_is_refused(tmp_path: Path, base: Path) -> None:
    _save(tmp_path / "plain", "gpt2", fan_in_fan_out=True)
    assert "the base model has no layer transformer.h.0." in _refusal(tmp_path / "plain", base)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    ],
)
def test_what_peft_saves_beyond_plain_lora_is_refused(
    tmp_path: Path, base: Path, config: dict[str, Any], reason: str
) -> None:
    _save(tmp_path / "more", **config)
    assert reason in _refusal(tmp_path / "more", base)


def test_another_kind_of_adapter_is_refused(plain: Path, base: Path) -> None:
    _edit_config(plain, peft_type="LOHA")
    assert "peft_type is 'LOHA'" in _refusal(plain, base)


def test_first_values_that_leave_the_base_as_it_is_are_no_hindrance(
    tmp_path: Path, base: Path
) -> None:
    _save(tmp_path / "plain", init_lora_weights="gaussian")
    import_adapter(tmp_path / "plain", task="mine", base=base)


def test_pickled_weights_are_not_read(plain: Path, base: Path) -> None:
    torch.save(load_file(plain / WEIGHTS), plain / "adapter_model.bin")
    (plain / WEIGHTS).unlink()
    assert f"found no {WEIGHTS}" in _refusal(plain, base)


def _not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_B.weight"][1, 1] = float("nan")


def _no_up(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{LAYER}.lora_B.weight"]


def _flat(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = torch.ones(16)


def _other_rank(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_A.weight"] = torch.ones(2, 16)


def _whole_layer(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.weight"] = torch.ones(16, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_not_a_number, r"q_proj\.lora_B\.weight holds values that are not finite"),
        (_no_up, r"q_proj has only one of lora_A and lora_B"),
        (_flat, r"q_proj has a lora_A of 16 and a lora_B of 16 × 3, which are no pair"),
        (_other_rank, r"q_proj has a lora_A of 2 × 16 and a lora_B of 16 × 3, which are no pair"),
        (_whole_layer, r"q_proj\.weight is no LoRA matrix"),
        (dict.clear, r"holds no LoRA matrices"),
    ],
)
def test_weights_that_are_no_low_rank_pairs_are_refused(
    plain: Path, base: Path, change: Callable[[dict[str, Tensor]], None], reason: str
) -> None:
    _edit_tensors(plain, change)
    assert re.search(reason, _refusal(plain, base))


def test_truncated_weights_are_refused(plain: Path, base: Path) -> None:
    (plain / WEIGHTS).write_bytes((plain / WEIGHTS).read_bytes()[:-100])
    assert f"{WEIGHTS}: cannot be read as safetensors" in _refusal(plain, base)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"lora_alpha": "8"}', "r: 8"])
def test_a_configuration_that_is_none_is_refused(plain: Path, base: Path, text: str) -> None:
    (plain / "adapter_config.json").write_text(text)
    assert "adapter_config.json: " in _refusal(plain, base)


def test_a_missing_configuration_is_refused(plain: Path, base: Path) -> None:
    (plain / "adapter_config.json").unlink()
    assert "adapter_config.json: cannot be read" in _refusal(plain, base)


def _move_paths(folder: Path, before: str, after: str) -> None:
    def move(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            start = f"base_model.model.{before}"
            assert name.startswith(start)
            moved = f"base_model.model.{after}{name.removeprefix(start)}"
            tensors[moved] = tensors.pop(name)

    _edit_tensors(folder, move)


@pytest.mark.parametrize(
    "prefix", ["model.language_model.", "language_model.model.", "", "base_model.model.model."]
)
@pytest.mark.parametrize("config", [{}, {"alpha_pattern": {"v_proj": 9}}])
def test_an_adapter_of_a_multimodal_model_is_brought_to_its_language_model_s_paths(
    tmp_path: Path, base: Path, prefix: str, config: dict[str, Any]
) -> None:
    plain = _save(tmp_path / "plain", **config)
    expected = plain(IDS).logits
    _move_paths(tmp_path / "plain", "model.", prefix)
    _edit_config(tmp_path / "plain", target_modules=r".*language_model.*\.(q_proj|v_proj)")
    out = _imported(tmp_path / "plain", base)
    torch.testing.assert_close(_fused_logits(out, "llama"), expected, atol=1e-4, rtol=1e-4)
    merged = PeftModel.from_pretrained(tiny_model(), str(out)).merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_paths_that_no_one_prefix_brings_to_the_base_are_refused(
    tmp_path: Path, plain: Path, base: Path
) -> None:
    _move_paths(plain, "model.", "model.language_model.")
    shutil.copytree(plain, tmp_path / "tower")
    _edit_tensors(
        tmp_path / "tower",
        lambda tensors: tensors.update(
            {
                name.replace("language_model", "vision"): tensor.clone()
                for name, tensor in tensors.items()
            }
        ),
    )
    assert "the base model has no layer model.language_model" in _refusal(tmp_path / "tower", base)
    _edit_config(plain, alpha_pattern={"model.language_model.layers.0.self_attn.q_proj": 9})
    assert "alpha_pattern names layers by other paths" in _refusal(plain, base)


def test_an_adapter_is_not_moved_to_other_layers(plain: Path, base: Path) -> None:
    def keep_one(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if not name.startswith(LAYER):
                del tensors[name]

    _edit_tensors(plain, keep_one)
    _move_paths(plain, "model.layers.0.", "model.layers.5.")
    assert "no layer model.layers.5.self_attn.q_proj" in _refusal(plain, base)


def test_a_pointer_of_git_lfs_is_named(plain: Path, base: Path) -> None:
    (plain / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(
        SourceError, match=r"adapter_model\.safetensors: holds a pointer of Git LFS"
    ):
        import_adapter(plain, task="mine", base=base)
