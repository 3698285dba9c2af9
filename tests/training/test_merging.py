"""Merges beside the sums that they stand for, and beside PEFT with the merge active."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from dlplora.adapters import LoraAdapter, LoraPair, read_adapter
from dlplora.errors import AdapterError
from dlplora.lora.attach import attached
from dlplora.params.training import CatMerge, LinearMerge, Merge, PrunedMerge, SvdMerge
from dlplora.records.routes import Route
from dlplora.training.merging import merge_adapters
from tests.device import on_device
from tests.peft_adapters import FINGERPRINT, peft_pool
from tests.tiny import FAN_IN_FAN_OUT, TARGETS, tiny_base, tiny_model

IDS = on_device([[5, 6, 7, 8], [9, 10, 11, 12]])
NAMES = ("a", "lora_A", "merged")  # names that stand in PEFT's keys, too
EQUAL = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": TARGETS["llama"],
}
CAT = CatMerge(kind="cat", weights="mean")
SVD = SvdMerge(kind="svd", weights="mean", rank=8)
LINEAR = LinearMerge(kind="linear", weights="mean")
TIES = PrunedMerge(kind="ties", weights="ones", density=0.5)
DARE_TIES = PrunedMerge(kind="dare_ties", weights="ones", density=0.5)
ALL = [CAT, SVD, LINEAR, TIES, DARE_TIES]


def pool(folder: Path, *configs: Mapping[str, Any], kind: str = "llama") -> list[LoraAdapter]:
    """Write random adapters of these configurations."""
    named = dict(zip(NAMES, configs, strict=False))
    return peft_pool(tiny_model(kind), named, folder)[1]


def merged(
    folder: Path, params: Merge, *, names: Sequence[str] = NAMES, kind: str = "llama", seed: int = 0
) -> LoraAdapter:
    """Merge adapters of a folder, write the merge there and read it back."""
    base = tiny_base(kind)
    folders = [folder / name for name in names]
    merge_adapters(base, folders, name="mine", params=params, seed=seed).save(folder / "mine")
    return read_adapter(folder / "mine", base_fingerprint=FINGERPRINT)


def delta(pair: LoraPair) -> Tensor:
    return pair.scaling * pair.up_OR @ pair.down_RI


def assert_same_deltas(found: LoraAdapter, expected: Mapping[str, Tensor]) -> None:
    assert found.pairs.keys() == expected.keys()
    for path, pair in found.pairs.items():
        torch.testing.assert_close(delta(pair), expected[path], atol=1e-5, rtol=1e-4)


def weighted_sum(adapters: Sequence[LoraAdapter], weight: float) -> dict[str, Tensor]:
    """Sum up what adapters add to each layer that any of them changes."""
    paths = sorted({path for adapter in adapters for path in adapter.pairs})
    return {
        path: sum(
            (weight * delta(adapter.pairs[path]) for adapter in adapters if path in adapter.pairs),
            start=torch.zeros(()),
        )
        for path in paths
    }


@pytest.mark.parametrize(("weights", "weight"), [("mean", 1 / 3), ("ones", 1.0)])
def test_cat_is_the_weighted_sum_whatever_ranks_scalings_and_layers(
    tmp_path: Path, weights: Any, weight: float
) -> None:
    adapters = pool(
        tmp_path,
        {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"], "use_rslora": True},
        {"r": 3, "lora_alpha": 1, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "target_modules": ["v_proj"], "alpha_pattern": {"v_proj": 9}},
    )
    found = merged(tmp_path, CatMerge(kind="cat", weights=weights))
    assert_same_deltas(found, weighted_sum(adapters, weight))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_svd_of_full_rank_is_the_weighted_sum(tmp_path: Path, kind: str) -> None:
    config = {"target_modules": TARGETS[kind], "fan_in_fan_out": FAN_IN_FAN_OUT[kind]}
    adapters = pool(tmp_path, *[EQUAL | config | {"r": 2}] * 3, kind=kind)  # 8 of at most 6
    assert_same_deltas(merged(tmp_path, SVD, kind=kind), weighted_sum(adapters, 1 / 3))


def test_svd_of_a_lower_rank_is_the_nearest_to_the_weighted_sum(tmp_path: Path) -> None:
    adapters = pool(tmp_path, EQUAL, EQUAL, EQUAL)
    found = merged(tmp_path, SvdMerge(kind="svd", weights="mean", rank=4))
    nearest = {}
    for path, whole in weighted_sum(adapters, 1 / 3).items():
        left, values, right = torch.linalg.svd(whole)
        nearest[path] = left[:, :4] @ torch.diag(values[:4]) @ right[:4]
    assert_same_deltas(found, nearest)


def test_linear_averages_the_matrices_apart(tmp_path: Path) -> None:
    adapters = pool(tmp_path, EQUAL, EQUAL | {"lora_alpha": 2}, EQUAL | {"use_rslora": True})
    found = merged(tmp_path, LINEAR)
    for path, pair in found.pairs.items():
        pairs = [adapter.pairs[path] for adapter in adapters]
        down = sum((one.scaling / 3) ** 0.5 * one.down_RI for one in pairs)
        up = sum((one.scaling / 3) ** 0.5 * one.up_OR for one in pairs)
        torch.testing.assert_close(delta(pair), up @ down, atol=1e-5, rtol=1e-4)


def test_ties_keeps_the_largest_and_averages_those_of_the_elected_sign(tmp_path: Path) -> None:
    adapters = pool(tmp_path, EQUAL, EQUAL, EQUAL)
    found = merged(tmp_path, TIES)
    for path, pair in found.pairs.items():
        pairs = [adapter.pairs[path] for adapter in adapters]
        root = pairs[0].scaling ** 0.5
        down = root * by_ties([one.down_RI for one in pairs], 0.5)
        up = root * by_ties([one.up_OR for one in pairs], 0.5)
        torch.testing.assert_close(delta(pair), up @ down, atol=1e-5, rtol=1e-4)


def by_ties(matrices: Sequence[Tensor], density: float) -> Tensor:
    """Merge matrices value by value (arXiv 2306.01708, section 3)."""
    trimmed = []
    for matrix in matrices:
        kept = sorted(matrix.abs().flatten().tolist(), reverse=True)
        least = kept[int(density * len(kept)) - 1]
        trimmed.append([value if abs(value) >= least else 0.0 for value in matrix.flatten()])
    values = []
    for column in zip(*trimmed, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        agreeing = [float(value) for value in column if value * sign > 0]
        values.append(sum(agreeing) / max(len(agreeing), 1))
    return torch.tensor(values).reshape(matrices[0].shape)


def test_dare_drops_by_the_seed(tmp_path: Path) -> None:
    pool(tmp_path, EQUAL, EQUAL, EQUAL)
    files = []
    for seed in (0, 0, 1):
        merged(tmp_path, DARE_TIES, seed=seed)
        files.append((tmp_path / "mine/adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("params", ALL, ids=lambda params: params.kind)
def test_fused_layers_give_the_logits_of_peft_with_the_merge_active(
    tmp_path: Path, params: Merge
) -> None:
    pool(tmp_path, EQUAL, EQUAL, EQUAL)
    adapter = merged(tmp_path, params)
    active = PeftModel.from_pretrained(tiny_model(), tmp_path / "mine").eval()
    model = tiny_model()
    plain = model(IDS).logits
    with (
        attached(model, [adapter]) as fused,
        fused.mixing(fused.mix([Route(("mine",), (1.0,))] * 2)),
    ):
        logits = model(IDS).logits
    torch.testing.assert_close(logits, active(IDS).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, plain, atol=1e-2)


def test_the_merge_in_force_is_the_merge_as_written(tmp_path: Path) -> None:
    pool(tmp_path, EQUAL, EQUAL, EQUAL)
    base = tiny_base()
    folders = [tmp_path / name for name in NAMES]
    merge_adapters(base, folders, name="mine", params=TIES, seed=0).save(tmp_path / "mine")
    for module in base.model.modules():  # PEFT's own layers, with the merge that PEFT made
        if hasattr(module, "set_adapter") and hasattr(module, "lora_A"):
            module.set_adapter("merged")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "mine").eval()
    torch.testing.assert_close(base.model(IDS).logits, again(IDS).logits)


@pytest.mark.parametrize("params", [CAT, SVD, LINEAR, TIES], ids=lambda params: params.kind)
def test_the_order_of_adapters_does_not_matter(tmp_path: Path, params: Merge) -> None:
    pool(tmp_path, EQUAL, EQUAL, EQUAL)
    first = merged(tmp_path, params)
    other = merged(tmp_path, params, names=NAMES[::-1])
    assert_same_deltas(other, {path: delta(pair) for path, pair in first.pairs.items()})


def test_two_merges_have_the_same_bytes_and_a_plain_configuration(tmp_path: Path) -> None:
    pool(tmp_path, EQUAL | {"use_rslora": True}, EQUAL, EQUAL)
    written = []
    for _ in range(2):
        merged(tmp_path, CAT)
        written.append([path.read_bytes() for path in sorted((tmp_path / "mine").iterdir())])
    assert written[0] == written[1]
    config = json.loads((tmp_path / "mine/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (9, 9, False)
    training = json.loads((tmp_path / "mine/training.json").read_text())
    assert (training["task"], training["curve"]["points"]) == ("mine", [])


@pytest.mark.parametrize("params", [LINEAR, TIES, DARE_TIES], ids=lambda params: params.kind)
def test_other_ranks_are_refused_by_name(tmp_path: Path, params: Merge) -> None:
    pool(tmp_path, EQUAL, EQUAL, EQUAL | {"r": 2})
    expected = r"merge mine: the adapter merged has rank 2 on .*q_proj, a has 3; expected equal"
    with pytest.raises(AdapterError, match=expected):
        merged(tmp_path, params)


def test_other_layers_are_refused_by_name(tmp_path: Path) -> None:
    pool(tmp_path, EQUAL, EQUAL | {"target_modules": ["q_proj"]}, EQUAL)
    expected = "merge mine: only one of the adapters a and lora_A changes .*v_proj"
    with pytest.raises(AdapterError, match=expected):
        merged(tmp_path, LINEAR)


def test_a_layer_that_peft_would_leave_out_is_refused(tmp_path: Path) -> None:
    pool(tmp_path, EQUAL | {"layers_to_transform": [0]}, EQUAL, EQUAL)
    with pytest.raises(AdapterError, match=re.escape("such as model.layers.1.self_attn.q_proj")):
        merged(tmp_path, CAT)


def test_a_rank_that_a_layer_cannot_have_is_refused(tmp_path: Path) -> None:
    pool(tmp_path, EQUAL, EQUAL, EQUAL)
    expected = "merge mine: rank 8 on .*v_proj, its configuration says 12; expected a rank of at"
    with pytest.raises(AdapterError, match=expected):
        merged(tmp_path, SvdMerge(kind="svd", weights="mean", rank=12))


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    pool(tmp_path, EQUAL, EQUAL, EQUAL)
    file = tmp_path / "a/training.json"
    file.write_text(file.read_text().replace(FINGERPRINT, "0" * 64))
    with pytest.raises(AdapterError, match="a: trained on the base model 000000000000"):
        merged(tmp_path, CAT)
