"""CGC-LoRA (arXiv 2402.01684): the experts of a cluster of tasks, trained jointly.

A step learns a batch of one task, and the tasks take turns: each has the same number of steps
whatever its size, and what the prompts of a task have in common is computed once for a batch.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlplora.adapters import WholeAdapter, peft_tensors
from dlplora.data.wordings import asked
from dlplora.kernels.choice import Kernel
from dlplora.lora.cluster import Cluster, cluster_of
from dlplora.lora.experts import attach_experts
from dlplora.models import Base
from dlplora.params.training import Adapter, Experts
from dlplora.records.examples import Example
from dlplora.records.files import written_folder
from dlplora.records.training import AdapterTraining
from dlplora.training.answers import AnswerTraining, like_batches, lora_config, training_of
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.pairs import Pair, encode_pairs
from dlplora.words import Advance, KernelChoice


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
                tensors = peft_tensors(self.cluster.folded(task).pairs)
                adapter = WholeAdapter(self.config, tensors, self.base_id, training)
                adapter.save(aside / "adapters" / task)


def train_experts(
    base: Base,
    examples: Mapping[str, TaskExamples],
    *,
    name: str,
    experts: Experts,
    training: Adapter,
    seed: int,
    kernels: KernelChoice,
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

    def encode(part: Sequence[Example]) -> list[list[Pair]]:
        worded = asked(part, share=training.reworded)
        return encode_pairs(worded, base.chat, max_tokens=training.max_tokens)

    learned = [encode(examples[task].train) for task in tasks]
    held_out = [encode(examples[task].validation) for task in tasks]
    answers = AnswerTraining(
        base.model, base.chat, params=training, kernels=kernels, title=f"experts {name}"
    )

    def batch(step: int, rows: Sequence[int]) -> list[Pair]:
        turn, number = divmod(step - 1, len(tasks))
        gate.task = number
        own = [learned[number][row] for row in rows]
        return [options[turn % len(options)] for options in own]

    def validation_loss(ran: Collection[Kernel]) -> float:
        losses = []
        for number, own in enumerate(held_out):
            gate.task = number
            losses.append(answers.validation_loss(own, ran))
        return sum(losses) / len(losses)

    curve, ran = answers.fit(
        batch,
        in_turns([like_batches(own, training.batch_size, seed=seed) for own in learned]),
        validation_loss,
        checkpoint=checkpoint,
        advance=advance,
    )
    size = training.rank * sum(
        layer.downs[0].shape[1] + layer.ups[0].shape[1] for layer in layers.values()
    )
    is_linear = all(isinstance(layer.base, nn.Linear) for layer in layers.values())
    return TrainedExperts(
        cluster=cluster_of(gate, layers, name=name, tasks=tasks, base_fingerprint=base.fingerprint),
        base_id=base.id,
        config=lora_config(training, fan_in_fan_out=not is_linear).to_dict(),  # type: ignore[no-untyped-call]
        trainings={
            task: training_of(
                task,
                base,
                examples[task].train,
                examples[task].validation,
                pairs=own,
                num_parameters=size,
                kernels=ran,
                curve=curve,
            )
            for task, own in zip(tasks, learned, strict=True)
        },
    )


def in_turns(streams: Sequence[Iterable[list[int]]]) -> Iterator[list[int]]:
    """Yield the next batch of each stream in turns, as long as all have one."""
    return chain.from_iterable(zip(*streams, strict=False))
