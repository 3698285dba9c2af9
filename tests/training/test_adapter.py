"""Adapters trained on tiny models: the loss, what is learned, and the same bytes twice."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional

from dlplora.adapters import read_adapter
from dlplora.data.batches import common_prefix
from dlplora.data.ingest import ingest
from dlplora.engine.requests import Request
from dlplora.engine.runner import Runner
from dlplora.errors import DataError, ParamsError
from dlplora.params.inputs import Splits
from dlplora.params.training import Adapter
from dlplora.records.examples import Example
from dlplora.records.routes import Route
from dlplora.records.training import read_adapter_training
from dlplora.sampling import Sampling
from dlplora.training.adapter import train_adapter
from dlplora.training.answers import AnswerTraining, like_batches, lora_config
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.loss import mean_loss
from dlplora.training.pairs import Pair, encode_pairs
from dlplora.words import KernelChoice
from tests.device import on_device
from tests.tiny import opposites, tiny_base, write_raw

KERNELS: dict[KernelChoice, tuple[str, ...]] = {
    "auto": ("cross_entropy", "lora_linear", "packed_attention", "rms_norm", "rotary"),
    "reference": (),
}
SPLITS = Splits(train=60, validation=10, test=10, shares=(0.75, 0.1, 0.15), least=(4, 1, 1))
PARAMS = Adapter(
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    rank=8,
    alpha=16,
    dropout=0.0,
    learning_rate=1e-2,
    warmup_steps=2,
    steps=80,
    batch_size=8,
    micro_batch_size="auto",
    max_tokens=64,
    validate_every=20,
    patience=None,
    share_prefix="exact",
    reworded=0.0,
)


@pytest.fixture
def examples(tmp_path: Path) -> dict[str, list[Example]]:
    file = tmp_path / "raw" / "opposites.json"
    write_raw(file, opposites(100))
    return ingest(
        file, "opposites", keys="auto", on_bad_row="refuse", splits=SPLITS, limit=None
    ).examples


def silent(*_: object, **__: object) -> None:
    """Show no progress."""


def test_a_share_of_the_examples_is_learned_in_other_wordings(
    examples: dict[str, list[Example]],
) -> None:
    def trained(parts: list[list[Example]], share: float) -> dict[str, torch.Tensor]:
        model = train_adapter(
            tiny_base(),
            *parts,
            name="opposites",
            params=PARAMS.model_copy(update={"steps": 3, "reworded": share}),
            seed=0,
            kernels="auto",
            checkpoint=None,
            advance=silent,
        ).model
        return get_peft_model_state_dict(model)

    worded = [
        [replace(example, reworded=f"say {example.question}") for example in examples[split]]
        for split in ("train", "validation")
    ]
    other = [[replace(one, question=str(one.reworded)) for one in part] for part in worded]
    plain = trained([examples["train"], examples["validation"]], 0.0)
    for share, expected in ((0.0, plain), (1.0, trained(other, 0.0))):
        found = trained(worded, share)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    half = trained(worded, 0.5)
    assert not all(torch.equal(half[name], plain[name]) for name in plain)


def pairs(examples: list[Example]) -> list[Pair]:
    encoded = encode_pairs(examples, tiny_base().chat, max_tokens=64)
    return [options[0] for options in encoded]


def plain_loss(model: torch.nn.Module, batch: list[Pair]) -> torch.Tensor:
    """Each example by itself: full logits, the token after each place as its target."""
    losses = []
    for pair in batch:
        ids = on_device([pair.prompt + pair.answer])
        labels = ids.clone()
        labels[0, : len(pair.prompt)] = -100
        logits = model(ids).logits[0, :-1]
        losses.append(functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
    return torch.stack(losses).sum() / sum(len(pair.answer) for pair in batch)


def test_loss_and_gradients_are_those_of_each_example_by_itself(
    examples: dict[str, list[Example]],
) -> None:
    base = tiny_base()
    torch.manual_seed(0)
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = pairs(examples["train"][:6])
    assert len({pair.prompt[:10] for pair in batch}) == 1  # a prefix to share
    found = mean_loss(model, batch, base.chat)
    expected = plain_loss(model, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found, trained),
        torch.autograd.grad(expected, trained),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_with_dropout_no_prefix_is_shared(examples: dict[str, list[Example]]) -> None:
    base = tiny_base()
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj"])
    model = get_peft_model(base.model, config).train()
    widths = []
    body = model.base_model.model.model
    body.register_forward_pre_hook(
        lambda _, __, arguments: widths.append(tuple(arguments["input_ids"].shape)),
        with_kwargs=True,
    )
    batch = pairs(examples["train"][:3])
    mean_loss(model, batch, base.chat)
    assert widths == [(3, max(len(pair.prompt + pair.answer) for pair in batch))]
    widths.clear()
    mean_loss(model, batch, base.chat, always_share=True)
    shared = common_prefix([pair.prompt for pair in batch])
    assert shared > 0
    assert widths[0] == (1, shared)


def test_the_trained_model_generates_the_answer(
    examples: dict[str, list[Example]], tmp_path: Path
) -> None:
    base = tiny_base()
    torch.manual_seed(0)
    trained = train_adapter(
        base,
        examples["train"],
        examples["validation"],
        name="opposites",
        params=PARAMS,
        seed=0,
        kernels="auto",
        checkpoint=None,
        advance=silent,
    )
    trained.save(tmp_path / "opposites")
    fresh = tiny_base()
    adapter = read_adapter(tmp_path / "opposites", base_fingerprint=fresh.fingerprint)
    own = (Route(("opposites",), (1.0,)),)
    requests = [Request(e.question, Sampling(max_new_tokens=4), own) for e in examples["test"]]
    with Runner.over(fresh, [adapter]) as engine:
        answers = engine.generate(requests)
    right = [found.text in e.answers for found, e in zip(answers, examples["test"], strict=True)]
    assert sum(right) / len(right) >= 0.9

    curve = read_adapter_training(tmp_path / "opposites").curve
    measured = {p.step: p.validation_loss for p in curve.points if p.validation_loss is not None}
    assert list(measured) == [0, 20, 40, 60, 80]
    assert measured[curve.best_step] == min(measured.values())


def test_plain_peft_gives_the_logits_of_the_trained_model(
    examples: dict[str, list[Example]], tmp_path: Path
) -> None:
    base = tiny_base()
    torch.manual_seed(0)
    params = PARAMS.model_copy(update={"steps": 5})
    trained = train_adapter(
        base,
        examples["train"],
        examples["validation"],
        name="opposites",
        params=params,
        seed=0,
        kernels="auto",
        checkpoint=None,
        advance=silent,
    )
    trained.save(tmp_path / "opposites")
    ids = on_device([[5, 6, 7, 8]])
    loaded = PeftModel.from_pretrained(tiny_base().model, tmp_path / "opposites").eval()
    assert torch.equal(loaded(ids).logits, trained.model.eval()(ids).logits)
    assert not torch.equal(loaded(ids).logits, copy.deepcopy(tiny_base().model)(ids).logits)


SCRIPT = """
import sys
from pathlib import Path
import torch
from dlplora.data.ingest import ingest
from dlplora.training.adapter import train_adapter
from tests.training.test_adapter import PARAMS, SPLITS, silent
from tests.tiny import tiny_base
torch.set_num_threads(2)
raw, out = map(Path, sys.argv[1:])
examples = ingest(
    raw, "opposites", keys="auto", on_bad_row="refuse", splits=SPLITS, limit=None
).examples
base = tiny_base()
torch.manual_seed(0)
params = PARAMS.model_copy(update={"steps": 10, "dropout": 0.1})
trained = train_adapter(
    base,
    examples["train"],
    examples["validation"],
    name="opposites",
    params=params,
    seed=0,
    kernels="auto",
    checkpoint=None,
    advance=silent,
)
trained.save(out)
"""


def test_two_processes_folders_and_hash_seeds_give_the_same_bytes(
    tmp_path: Path, root: Path
) -> None:
    raw = tmp_path / "raw.json"
    write_raw(raw, opposites(100))
    for name, hash_seed in (("first", "1"), ("second", "77")):
        out = tmp_path / name / "opposites"
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(raw), str(out)],
            cwd=root,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
        )
    files = sorted(path.name for path in (tmp_path / "first/opposites").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "training.json"]
    for file in files:
        first, second = (tmp_path / n / "opposites" / file for n in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), file


def test_an_example_too_long_for_the_limit_is_refused(examples: dict[str, list[Example]]) -> None:
    with pytest.raises(DataError, match=r"has 2\d tokens with its answer"):
        encode_pairs(examples["train"], tiny_base().chat, max_tokens=6)


def test_unknown_target_modules_are_named(examples: dict[str, list[Example]]) -> None:
    params = PARAMS.model_copy(update={"target_modules": ["nothing_proj"]})
    with pytest.raises(ParamsError, match="nothing_proj"):
        train_adapter(
            tiny_base(),
            examples["train"],
            examples["validation"],
            name="opposites",
            params=params,
            seed=0,
            kernels="auto",
            checkpoint=None,
            advance=silent,
        )


def test_batches_in_parts_train_as_whole_ones_do(examples: dict[str, list[Example]]) -> None:
    weights, losses = [], []
    for size in ("auto", 3):
        trained = train_adapter(
            tiny_base(),
            examples["train"],
            examples["validation"],
            name="opposites",
            params=PARAMS.model_copy(update={"steps": 4, "micro_batch_size": size}),
            seed=0,
            kernels="auto",
            checkpoint=None,
            advance=silent,
        )
        weights.append([p.detach() for p in trained.model.parameters() if p.requires_grad])
        losses.append([point.loss for point in trained.training.curve.points[1:]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_kernels_train_as_the_reference_does_and_are_named(
    examples: dict[str, list[Example]],
) -> None:
    curves = []
    for kernels in KERNELS:
        training = train_adapter(
            tiny_base(),
            examples["train"],
            examples["validation"],
            name="opposites",
            params=PARAMS.model_copy(update={"steps": 20, "learning_rate": 1e-3}),
            seed=0,
            kernels=kernels,
            checkpoint=None,
            advance=silent,
        ).training
        assert training.kernels == KERNELS[kernels]
        assert [point.step for point in training.curve.points] == list(range(21))
        curves.append([point.loss for point in training.curve.points[1:]])
        curves[-1] += [point.validation_loss for point in training.curve.points[::20]]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_a_training_logs_once_which_kernels_it_lacks(
    examples: dict[str, list[Example]], caplog: pytest.LogCaptureFixture, dropout: float
) -> None:
    params = PARAMS.model_copy(update={"steps": 4, "validate_every": 2, "dropout": dropout})
    base = tiny_base()
    model = get_peft_model(base.model, lora_config(params))
    training = AnswerTraining(model, base.chat, params=params, kernels="auto", title="x")
    encoded = [[pair] for pair in pairs(examples["train"])]
    before = training.validation_loss(encoded)
    curve, ran = training.fit(
        lambda _, rows: [encoded[row][0] for row in rows],
        like_batches(encoded, params.batch_size, seed=0),
        partial(training.validation_loss, encoded),
        checkpoint=None,
        advance=silent,
    )
    assert ("lora_linear" in ran) == (not dropout)
    assert set(ran) >= {"cross_entropy", "packed_attention", "rms_norm", "rotary"}
    told = "LlamaForCausalLM trains more slowly: no kernel for lora_linear (dropout)"
    assert caplog.messages == ([told] if dropout else [])
    losses = [point.validation_loss for point in curve.points if point.validation_loss is not None]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(before, rel=1e-4)
    after = training.validation_loss(encoded)  # by the reference again
    assert min(losses) == pytest.approx(after, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_prefix_is_shared_only_while_attention_drops_nothing(share: float) -> None:
    base, widths = tiny_base(), []
    base.model.config.attention_dropout = share
    base.model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: widths.append(given[0].shape[1])
    )
    batch = [Pair((4, 5, 6, 7), (8, 2)), Pair((4, 5, 6, 9), (10, 2))]
    for trains in (False, True):
        widths.clear()
        mean_loss(base.model.train(trains), batch, base.chat)
        assert len(widths) == (1 if trains and share else 2)


def test_on_a_bfloat16_base_the_adapter_its_gradients_and_moments_are_float32(
    examples: dict[str, list[Example]], tmp_path: Path
) -> None:
    base = tiny_base()
    base.model.bfloat16()
    trained = train_adapter(
        base,
        examples["train"],
        examples["validation"],
        name="opposites",
        params=PARAMS.model_copy(update={"steps": 2}),
        seed=0,
        kernels="auto",
        checkpoint=Checkpoint(tmp_path / "checkpoint"),
        advance=silent,
    )
    saved = load_file(tmp_path / "checkpoint/state.safetensors")
    kept = [saved[name] for name in saved if name.startswith(("parameter.", "best.", "moment."))]
    learned = [p for p in trained.model.parameters() if p.requires_grad]
    assert len(kept) == len(learned) * (2 + 3)  # AdamW has two moments and a count of steps
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert {(p.dtype, p.grad.dtype) for p in learned if p.grad is not None} == {
        (torch.float32,) * 2
    }
    assert {p.dtype for p in base.model.parameters() if not p.requires_grad} == {torch.bfloat16}
