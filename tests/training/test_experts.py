"""CGC-LoRA's experts: the layer, its gradients, what is learned in turns, folding, going on."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from itertools import islice
from math import inf
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter, read_adapter
from dlplora.data.ingest import ingest
from dlplora.errors import AdapterError, ParamsError
from dlplora.lora.attach import attached
from dlplora.lora.cluster import Cluster, cluster_of
from dlplora.lora.experts import ExpertLinear, TaskGate, attach_experts
from dlplora.models import Base
from dlplora.params.training import Adapter, Experts
from dlplora.records.routes import Route
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.experts import TaskExamples, TrainedExperts, in_turns, train_experts
from dlplora.training.loss import mean_loss
from dlplora.training.pairs import encode_pairs
from tests.device import on_device
from tests.tiny import FAN_IN_FAN_OUT, TARGETS, choices, opposites, tiny_base, write_raw
from tests.training.test_adapter import PARAMS as ADAPTER
from tests.training.test_adapter import SPLITS, plain_loss, silent

IDS = on_device([[5, 6, 7, 8], [9, 10, 11, 12]])
EXPERTS = Experts(
    tasks=["colours", "opposites"], common=2, specific=1, expert_rank=2, embedding=5, training={}
)
TRAINING = ADAPTER.model_copy(
    update={"target_modules": ["q_proj", "v_proj"], "rank": 6, "alpha": 9, "steps": 6}
)


@pytest.fixture
def examples(tmp_path: Path) -> dict[str, TaskExamples]:
    found = {}
    for name, items in (("opposites", opposites(100)), ("colours", choices(100))):
        file = tmp_path / "raw" / f"{name}.json"
        write_raw(file, items)
        read = ingest(
            file, name, keys="auto", on_bad_row="refuse", splits=SPLITS, limit=None
        ).examples
        found[name] = TaskExamples(read["train"], read["validation"])
    return found


def with_experts(base: Base, targets: list[str]) -> tuple[TaskGate, dict[str, ExpertLinear]]:
    """Attach experts whose matrices and gate are all random."""
    torch.manual_seed(1)
    gate, layers = attach_experts(
        base.model,
        targets,
        num_tasks=3,
        num_common=2,
        num_specific=1,
        rank=2,
        width=5,
        scaling=1.5,
        dropout=0.0,
    )
    with torch.no_grad():
        for module in (gate, *layers.values()):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
    return gate, layers


def taken(base: Base, gate: TaskGate, layers: dict[str, ExpertLinear]) -> Cluster:
    return cluster_of(
        gate, layers, name="all", tasks=["a", "b", "c"], base_fingerprint=base.fingerprint
    )


class PlainExperts(nn.Module):
    """The sum of the paper written out: expert after expert."""

    def __init__(self, layer: ExpertLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, task = self.layer, self.layer.gate.task
        logits = [
            sum(w * e for w, e in zip(row, layer.gate.embeddings_TD[task], strict=True))
            for row in layer.gate.weight_ED
        ]
        powers = [logit.exp() for logit in logits]
        y = layer.base(x)
        places = [(0, 0), (0, 1), (1 + task, 0)]  # two common experts, one of the task
        for power, (number, place) in zip(powers, places, strict=True):
            rows = slice(2 * place, 2 * place + 2)
            a, b = layer.downs[number][rows], layer.ups[number][rows].T
            y = y + 1.5 * power / sum(powers) * (b @ (a @ x.transpose(1, 2))).transpose(1, 2)
        return y


@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_layer_is_the_sum_over_the_experts_of_the_task(task: int) -> None:
    gate, layers = with_experts(tiny_base(), TARGETS["llama"])
    gate.task = task
    x = torch.randn(3, 4, 16)
    for layer in layers.values():
        torch.testing.assert_close(layer(x), PlainExperts(layer)(x), atol=1e-5, rtol=1e-5)


def test_at_first_the_experts_add_nothing_and_weigh_the_same() -> None:
    base = tiny_base()
    expected = base.model(IDS).logits
    gate, _ = attach_experts(
        base.model,
        ["q_proj"],
        num_tasks=2,
        num_common=1,
        num_specific=2,
        rank=2,
        width=4,
        scaling=2.0,
        dropout=0.0,
    )
    assert torch.equal(base.model(IDS).logits, expected)
    assert gate().tolist() == pytest.approx([1 / 3] * 3)


def test_loss_and_gradients_are_those_of_the_plain_sum(
    examples: dict[str, TaskExamples],
) -> None:
    base = tiny_base()
    gate, layers = with_experts(base, TARGETS["llama"])
    gate.task = 2
    plain = copy.deepcopy(base.model)
    for path in layers:
        layer = plain.get_submodule(path)
        parent, _, name = path.rpartition(".")
        setattr(plain.get_submodule(parent), name, PlainExperts(layer))
    pairs = encode_pairs(examples["opposites"].train[:6], base.chat, max_tokens=64)
    batch = [options[0] for options in pairs]
    found, expected = mean_loss(base.model, batch, base.chat), plain_loss(plain, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    trained, reference = (
        [parameter for parameter in model.parameters() if parameter.requires_grad]
        for model in (base.model, plain)
    )
    assert len(trained) == 2 + 8 * len(layers)
    for one, other in zip(
        torch.autograd.grad(found, trained, allow_unused=True),
        torch.autograd.grad(expected, reference, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)  # no gradient for the experts of other tasks
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", list(TARGETS))
def test_folded_experts_are_the_layer_in_the_fused_engine(kind: str) -> None:
    base = tiny_base(kind)
    gate, layers = with_experts(base, TARGETS[kind])
    cluster = taken(base, gate, layers)
    expected = {}
    for number, task in enumerate(cluster.tasks):
        gate.task = number
        expected[task] = base.model(IDS).logits
    fresh = tiny_base(kind).model
    with attached(fresh, [cluster.folded(task) for task in cluster.tasks]) as pool:
        for task in cluster.tasks:
            with pool.mixing(pool.mix([Route((task,), (1.0,))] * 2)):
                found = fresh(IDS).logits
            torch.testing.assert_close(found, expected[task], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected["a"], expected["b"], atol=1e-3)


def trained(
    examples: dict[str, TaskExamples],
    kind: str = "llama",
    *,
    training: Adapter = TRAINING,
    experts: Experts = EXPERTS,
    checkpoint: Checkpoint | None = None,
    base: Base | None = None,
) -> TrainedExperts:
    return train_experts(
        base or tiny_base(kind),
        examples,
        name="all",
        experts=experts,
        training=training.model_copy(update={"target_modules": TARGETS[kind]}),
        seed=0,
        kernels="auto",
        checkpoint=checkpoint,
        advance=silent,
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_reads_each_exported_adapter_and_agrees_with_the_layer(
    kind: str, examples: dict[str, TaskExamples], tmp_path: Path
) -> None:
    base = tiny_base(kind)
    trained(examples, kind, base=base).save(tmp_path / "all")
    gate = next(module for module in base.model.modules() if isinstance(module, TaskGate))
    for number, task in enumerate(["colours", "opposites"]):
        gate.task = number
        folder = tmp_path / "all" / "adapters" / task
        model = PeftModel.from_pretrained(tiny_base(kind).model, folder).eval()
        expected = base.model.eval()(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (6, 9)
        assert config["fan_in_fan_out"] is FAN_IN_FAN_OUT[kind]
        adapter = read_adapter(folder, base_fingerprint=base.fingerprint)
        assert {len(pair.down_RI) for pair in adapter.pairs.values()} == {6}
        assert {pair.scaling for pair in adapter.pairs.values()} == {1.5}


def test_what_is_saved_comes_back_with_its_ranks_told(
    examples: dict[str, TaskExamples], tmp_path: Path
) -> None:
    done = trained(examples)
    done.save(tmp_path / "all")
    found = Cluster.load(tmp_path / "all", base_fingerprint="f" * 64)
    assert found.tasks == ("colours", "opposites")
    assert [expert.name for expert in found.experts] == [
        *("all.common.1", "all.common.2", "colours.1", "opposites.1")
    ]
    for one, other in zip(found.experts, done.cluster.experts, strict=True):
        assert_same(one, other)
    card = json.loads((tmp_path / "all/experts.json").read_text())
    assert (card["expert_rank"], card["active_rank"], card["total_rank"]) == (2, 6, 8)
    sizes = [pair.down_RI.numel() + pair.up_OR.numel() for pair in found.common[0].pairs.values()]
    assert card["num_parameters"] == 4 * sum(sizes) + 2 * 5 + 3 * 5
    for task in found.tasks:
        assert sum(card["gates"][task]) == pytest.approx(1)


def assert_same(one: LoraAdapter, other: LoraAdapter) -> None:
    assert one.pairs.keys() == other.pairs.keys()
    for path, pair in one.pairs.items():
        assert torch.equal(pair.down_RI, other.pairs[path].down_RI)
        assert torch.equal(pair.up_OR, other.pairs[path].up_OR)
        assert pair.scaling == other.pairs[path].scaling


@pytest.mark.parametrize("change", ["cut", "gone", "another base"])
def test_experts_that_cannot_be_used_are_refused_in_one_line(
    change: str, examples: dict[str, TaskExamples], tmp_path: Path
) -> None:
    trained(examples).save(tmp_path / "all")
    file = tmp_path / "all/experts.safetensors"
    if change == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    if change == "gone":
        file.unlink()
    fingerprint = ("e" if change == "another base" else "f") * 64
    with pytest.raises(AdapterError, match=r"all") as caught:
        Cluster.load(tmp_path / "all", base_fingerprint=fingerprint)
    wanted = {"cut": "truncated or changed", "gone": "no usable experts"}
    assert wanted.get(change, "trained on the base model ffff") in str(caught.value)


def test_both_tasks_are_learned_and_the_gates_move_apart(
    examples: dict[str, TaskExamples],
) -> None:
    training = TRAINING.model_copy(update={"steps": 80, "validate_every": 40})
    done = trained(examples, training=training)
    curve = done.trainings["colours"].curve
    assert curve == done.trainings["opposites"].curve
    losses = [point.validation_loss for point in curve.points if point.validation_loss is not None]
    assert min(losses) < 0.5 * losses[0]
    gates = done.cluster.gate(torch.eye(2))
    assert (gates[0] - gates[1]).abs().max() > 0.01


def test_a_step_moves_the_common_experts_and_those_of_its_task_alone(
    examples: dict[str, TaskExamples],
) -> None:
    one_step = TRAINING.model_copy(update={"steps": 1, "validate_every": 1})
    done = trained(examples, training=one_step)
    moved = {
        expert.name: any(bool(pair.up_OR.any()) for pair in expert.pairs.values())
        for expert in done.cluster.experts
    }
    assert moved == {
        "all.common.1": True,
        "all.common.2": True,
        "colours.1": True,
        "opposites.1": False,
    }


def test_tasks_take_turns() -> None:
    def stream(first: int) -> Iterator[list[int]]:
        while True:
            yield [first]
            first += 1

    batches = in_turns([stream(0), stream(10), stream(20)])
    assert list(islice(batches, 7)) == [[0], [10], [20], [1], [11], [21], [2]]


def test_every_answer_of_a_question_is_learned_also_with_two_tasks_in_turns(
    examples: dict[str, TaskExamples], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def watched(model: nn.Module, batch: list[object], chat: object, **how: object) -> Tensor:
        if model.training:
            seen.extend(pair.answer for pair in batch)  # type: ignore[attr-defined]
        return mean_loss(model, batch, chat, **how)  # type: ignore[arg-type]

    monkeypatch.setattr("dlplora.training.answers.mean_loss", watched)
    both = [
        dataclasses.replace(row, answers=("red", "green")) for row in examples["opposites"].train
    ]
    changed = examples | {"opposites": TaskExamples(both, examples["opposites"].validation)}
    trained(changed, training=TRAINING.model_copy(update={"steps": 4}))
    chat = tiny_base().chat
    own = {(*chat.answer(word), chat.end_id) for word in ("red", "green")}
    assert own <= set(seen[8:16]) | set(seen[24:32])
    assert len(set(seen[8:16])) == len(set(seen[24:32])) == 1


def test_a_training_that_was_killed_ends_with_the_same_bytes(
    examples: dict[str, TaskExamples], tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    class Killed(Checkpoint):
        def save(self, progress: object) -> None:
            super().save(progress)  # type: ignore[arg-type]
            if len(progress.curve.points) == 1 + 3:  # type: ignore[attr-defined]
                raise KilledError

    trained(examples).save(tmp_path / "whole")
    place = tmp_path / "checkpoint"
    with pytest.raises(KilledError):
        trained(examples, checkpoint=Killed(place, share=inf, first_seconds=0))
    trained(examples, checkpoint=Checkpoint(place)).save(tmp_path / "resumed")
    files = sorted(
        path.relative_to(tmp_path / "whole")
        for path in (tmp_path / "whole").rglob("*")
        if path.is_file()
    )
    assert len(files) == 2 + 2 * 3
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (
            tmp_path / "resumed" / file
        ).read_bytes()


@pytest.mark.parametrize(
    ("target", "words"), [("nothing", "has no layer nothing"), ("norm", "is no linear layer")]
)
def test_a_target_that_is_no_linear_layer_is_refused(
    target: str, words: str, examples: dict[str, TaskExamples]
) -> None:
    with pytest.raises(ParamsError, match=words):
        train_experts(
            tiny_base(),
            examples,
            name="all",
            experts=EXPERTS,
            training=TRAINING.model_copy(update={"target_modules": ["q_proj", target]}),
            seed=0,
            kernels="auto",
            checkpoint=None,
            advance=silent,
        )


def test_on_a_bfloat16_base_experts_gates_and_moments_are_float32(
    examples: dict[str, TaskExamples], tmp_path: Path
) -> None:
    base = tiny_base()
    base.model.bfloat16()
    trained(
        examples,
        training=TRAINING.model_copy(update={"steps": 2}),
        checkpoint=Checkpoint(tmp_path / "checkpoint"),
        base=base,
    )
    saved = load_file(tmp_path / "checkpoint/state.safetensors")
    kept = [saved[name] for name in saved if name.startswith(("parameter.", "best.", "moment."))]
    assert kept
    assert {tensor.dtype for tensor in kept} == {torch.float32}
