"""CGC-LoRA (arXiv 2402.01684): the experts of a cluster of tasks, trained jointly.

A step learns a batch of one task, and the tasks take turns: each has the same number of steps
whatever its size, and what the prompts of a task have in common is computed once for a batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from dlplora.adapters import LoraAdapter, write_adapter
from dlplora.data.batches import batch_order, prefix_groups
from dlplora.lora.cluster import Cluster, cluster_of
from dlplora.lora.experts import ExpertLinear, attach_experts
from dlplora.models import Base
from dlplora.params.training import Adapter, Experts
from dlplora.records.examples import Example
from dlplora.records.files import written_folder
from dlplora.records.training import AdapterTraining, Curve, write_adapter_training
from dlplora.training.adapter import Speed, data_sha256_of
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.lean import lean
from dlplora.training.loop import Schedule, fit
from dlplora.training.loss import first_answers_loss, mean_loss
from dlplora.training.pairs import Pair, encode_pairs
from dlplora.training.parts import Parts
from dlplora.words import Advance


@dataclass(frozen=True)
class TaskExamples:
    """What the experts learn of one task."""

    train: Sequence[Example]
    validation: Sequence[Example]


@dataclass(frozen=True)
class TrainedExperts:
    """The experts of a cluster; folded, one plain adapter for each of its tasks."""

    cluster: Cluster
    base_id: str
    config: Mapping[str, Any]
    trainings: Mapping[str, AdapterTraining]

    def save(self, folder: Path) -> None:
        """Write the experts, and in adapters/ a folder of PEFT's format for each task."""
        with written_folder(folder) as aside:
            self.cluster.save(aside)
            for task, training in self.trainings.items():
                own = aside / "adapters" / task
                own.mkdir(parents=True)
                tensors = peft_tensors(self.cluster.folded(task))
                write_adapter(own, self.config, tensors, base_id=self.base_id)
                write_adapter_training(own, training)


@dataclass(frozen=True)
class _Encoded:
    """The tokens of one task's examples, each with all of its answers."""

    train: list[list[Pair]]
    validation: list[list[Pair]]


def train_experts(
    base: Base,
    examples: Mapping[str, TaskExamples],
    *,
    name: str,
    experts: Experts,
    training: Adapter,
    seed: int,
    checkpoint: Checkpoint | None,
    advance: Advance,
) -> TrainedExperts:
    """Train the experts of the cluster `name` on the examples of its tasks.

    Of n accepted answers, a task's step s learns answer s mod n. The weights of the lowest mean
    of the tasks' validation losses are kept. Raises as `train_adapter` does.
    """
    tasks = sorted(examples)
    torch.manual_seed(seed)
    gate, layers = attach_experts(
        base.model,
        training.target_modules,
        num_tasks=len(tasks),
        num_common=experts.common,
        num_specific=experts.specific,
        rank=experts.expert_rank,
        width=experts.embedding,
        scaling=training.alpha / training.rank,
        dropout=training.dropout,
    )
    encoded = [_encoded(examples[task], base, training) for task in tasks]
    parameters = [parameter for parameter in base.model.parameters() if parameter.requires_grad]
    title = f"experts {name}"
    parts = Parts(training.batch_size, training.micro_batch_size, title)
    speed = Speed()
    always_share = training.share_prefix == "always"

    def backward(step: int, rows: Sequence[int]) -> float:
        turn, number = divmod(step - 1, len(tasks))
        gate.task = number
        answers = [encoded[number].train[row] for row in rows]
        batch = [options[turn % len(options)] for options in answers]
        speed.num_tokens += sum(len(pair.prompt) + len(pair.answer) for pair in batch)
        base.model.train()
        return parts.backward(
            batch,
            lambda part: mean_loss(base.model, part, base.chat, always_share=always_share),
            weight=lambda pair: len(pair.answer),
            parameters=parameters,
        )

    def validation_loss() -> float:
        losses = []
        for number, own in enumerate(encoded):
            gate.task = number
            losses.append(first_answers_loss(base.model, own.validation, base.chat, parts))
        return sum(losses) / len(losses)

    with lean(base.model):
        curve = fit(
            parameters,
            backward,
            in_turns([_batches(own.train, training.batch_size, seed) for own in encoded]),
            validation_loss=validation_loss,
            schedule=Schedule.of(training),
            checkpoint=checkpoint,
            on_step=lambda point: advance(loss=point.loss, tokens_per_second=speed.now()),
            title=title,
        )
    size = training.rank * sum(
        layer.downs[0].shape[1] + layer.ups[0].shape[1] for layer in layers.values()
    )
    return TrainedExperts(
        cluster=cluster_of(gate, layers, name=name, tasks=tasks, base_fingerprint=base.fingerprint),
        base_id=base.id,
        config=_folded_config(training, layers),
        trainings={
            task: _training(task, examples[task], own, base, curve, size)
            for task, own in zip(tasks, encoded, strict=True)
        },
    )


def in_turns(streams: Sequence[Iterable[list[int]]]) -> Iterator[list[int]]:
    """Yield the next batch of each stream in turns, as long as all have one."""
    return chain.from_iterable(zip(*streams, strict=False))


def _batches(pairs: Sequence[Sequence[Pair]], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of one task's rows for ever."""
    prompts = [options[0].prompt for options in pairs]
    return batch_order(
        [len(options[0].prompt) + len(options[0].answer) for options in pairs],
        batch_size,
        seed=seed,
        groups=prefix_groups(prompts, batch_size),
    )


def _encoded(examples: TaskExamples, base: Base, training: Adapter) -> _Encoded:
    train = encode_pairs(examples.train, base.chat, max_tokens=training.max_tokens)
    validation = encode_pairs(examples.validation, base.chat, max_tokens=training.max_tokens)
    return _Encoded(train, validation)


def peft_tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
    """Name the matrices of an adapter as PEFT's files do."""
    return {
        f"base_model.model.{path}.lora_{side}.weight": tensor
        for path, pair in adapter.pairs.items()
        for side, tensor in (("A", pair.down_RI), ("B", pair.up_OR))
    }


def _folded_config(training: Adapter, layers: Mapping[str, ExpertLinear]) -> dict[str, Any]:
    """Return PEFT's configuration of a folded adapter."""
    config: dict[str, Any] = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        target_modules=list(training.target_modules),
        fan_in_fan_out=not all(isinstance(layer.base, nn.Linear) for layer in layers.values()),
        task_type="CAUSAL_LM",
    ).to_dict()  # type: ignore[no-untyped-call]
    return config


def _training(
    task: str, examples: TaskExamples, encoded: _Encoded, base: Base, curve: Curve, folded: int
) -> AdapterTraining:
    """Describe how a task's folded adapter came to be; the curve is of the whole cluster."""
    return AdapterTraining(
        task=task,
        base_fingerprint=base.fingerprint,
        is_imported=False,
        data_sha256=data_sha256_of([*examples.train, *examples.validation]),
        num_examples=len(examples.train),
        num_parameters=folded,
        longest_answer_tokens=max(
            len(pair.answer) for options in encoded.train for pair in options
        ),
        curve=curve,
    )
