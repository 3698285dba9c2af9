"""Families of models: all that is computed is what PEFT computes, or one line before training."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.families import (
    FAMILIES,
    PAGE,
    RESULTS,
    Outcome,
    attempt,
    convert,
    table,
    train,
    write_family,
)
from dlplora.errors import ModelError, ParamsError
from dlplora.models import context_of
from tests.device import float32_place

PLACE = float32_place()
# One each without SDPA, with ALiBi, learned positions, experts, states and counted positions, a
# cache of its own name, no cache at all, and a part of a multimodal one.
REPRESENTATIVES = [
    "gemma2", "bloom", "falcon (ALiBi)", "opt", "mixtral", "lfm2", "bamba", "mamba2",
    "recurrent_gemma", "llava",
]  # fmt: skip


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_a_batch_is_read_written_scored_and_trained_on_as_peft_does_it_row_by_row(
    name: str, tmp_path: Path
) -> None:
    outcome = attempt(name, tmp_path, PLACE)
    assert outcome.works, outcome


@pytest.mark.parametrize("name", ["t5", "qwen2_vl", "bert"])
def test_what_is_no_causal_model_of_text_is_refused_when_the_base_is_made(
    name: str, tmp_path: Path
) -> None:
    write_family(name, tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        convert(tmp_path / "model", tmp_path / "base", PLACE)
    assert name.split("_")[0] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("name", ["jamba", "falcon_h1", "rwkv"])
def test_a_model_that_would_take_padding_in_is_refused_if_it_is_not_read_apart(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("engine.cache", "training.loss"):
        monkeypatch.setattr(f"dlplora.{module}.reads_apart", lambda _: False)
    write_family(name, tmp_path / "model")
    with pytest.raises(ModelError, match="cannot be used"):
        convert(tmp_path / "model", tmp_path / "base", PLACE)


@pytest.mark.parametrize(
    ("name", "targets", "told"),
    [
        ("mixtral", ["q_proj", "w1"], "no layer w1; its linear layers are: k_proj, o_proj, q_proj"),
        ("gpt_neox", ["q_proj"], "no layer q_proj; its linear layers are: dense, dense_4h_to_h"),
        ("deepseek_v3", ["kv_b_proj"], "kv_b_proj: an input of"),
        ("qwen2_moe", ["shared_expert_gate"], "shared_expert_gate"),
        ("mamba", ["conv1d"], "conv1d is no linear layer: Conv1d"),
        ("llama", ["lm_head"], "lm_head is the model's output head"),
    ],
)
def test_layers_that_cannot_be_fused_are_refused_before_an_adapter_is_trained(
    name: str, targets: list[str], told: str, tmp_path: Path
) -> None:
    write_family(name, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "base", PLACE)
    with pytest.raises(ParamsError, match=r"^params\.yaml: adapter\.target_modules: ") as caught:
        train(tmp_path / "base", targets, tmp_path / "adapters", PLACE)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "context"),
    [("llama", 128), ("gpt2", 128), ("opt", 128), ("falcon (ALiBi)", None), ("mamba", None)],
)
def test_the_context_is_what_the_model_can_read(
    name: str, context: int | None, tmp_path: Path
) -> None:
    write_family(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert context_of(model) == context
    with torch.no_grad():
        model(input_ids=torch.full((1, context or 300), 5))
        if name in ("gpt2", "opt"):  # learned positions: there is a row for each, and no more
            with pytest.raises(IndexError):
                model(input_ids=torch.full((1, 129), 5))


def test_the_page_shows_what_the_last_run_found() -> None:
    found = json.loads(RESULTS.read_text())["families"]
    outcomes = [Outcome(**{k: v for k, v in row.items() if k != "works"}) for row in found]
    assert table(outcomes) in PAGE.read_text()
    assert [outcome.family for outcome in outcomes] == list(FAMILIES)
    assert all(outcome.works or outcome.refusal for outcome in outcomes)
