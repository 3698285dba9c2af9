"""One LoRA adapter for one task, by PEFT, on a frozen base model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

from dlplora.adapters import WholeAdapter
from dlplora.data.batches import batches_in_order
from dlplora.data.wordings import asked
from dlplora.errors import ParamsError
from dlplora.lora.attach import check_fusable, target_paths
from dlplora.models import Base
from dlplora.params.training import Adapter
from dlplora.records.examples import Example
from dlplora.records.training import AdapterTraining
from dlplora.training.answers import (
    AnswerTraining,
    first_lengths,
    like_batches,
    lora_config,
    training_of,
)
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.pairs import encode_pairs
from dlplora.training.warnings import ignore_peft_warnings
from dlplora.words import Advance, KernelChoice


@dataclass(frozen=True)
class TrainedAdapter:
    """A PEFT model with a trained adapter, and how it came to be."""

    model: PeftModel
    base_id: str
    training: AdapterTraining

    def save(self, folder: Path) -> None:
        """Write PEFT's folder and training.json."""
        config = self.model.peft_config["default"].to_dict()
        tensors = get_peft_model_state_dict(self.model)
        WholeAdapter(config, tensors, self.base_id, self.training).save(folder)


def train_adapter(
    base: Base,
    train: Sequence[Example],
    validation: Sequence[Example],
    *,
    name: str,
    params: Adapter,
    seed: int,
    kernels: KernelChoice,
    in_order: bool = False,
    checkpoint: Checkpoint | None,
    advance: Advance,
) -> TrainedAdapter:
    """Train an adapter on examples; of n accepted answers, step s learns answer s mod n.

    `name` is that of its task, or its own if the examples are of several tasks. Batches are drawn
    by the seed, each of like lengths and beginnings, or are cut from the examples `in_order`. A
    share of the examples is asked in other wordings.

    Raises `DataError` if an example is longer than `max_tokens`, and
    `TrainingError` if the loss is not finite or not even one example fits into memory.
    """
    train, validation = (asked(part, share=params.reworded) for part in (train, validation))
    torch.manual_seed(seed)
    model = _with_lora(base, params)
    pairs = encode_pairs(train, base.chat, max_tokens=params.max_tokens)
    held_out = encode_pairs(validation, base.chat, max_tokens=params.max_tokens)
    training = AnswerTraining(
        model, base.chat, params=params, kernels=kernels, title=f"adapter {name}"
    )
    curve, ran = training.fit(
        lambda step, rows: [pairs[row][step % len(pairs[row])] for row in rows],
        batches_in_order(first_lengths(pairs), params.batch_size)
        if in_order
        else like_batches(pairs, params.batch_size, seed=seed),
        partial(training.validation_loss, held_out),
        checkpoint=checkpoint,
        advance=advance,
    )
    told = training_of(
        name,
        base,
        train,
        validation,
        pairs=pairs,
        num_parameters=sum(parameter.numel() for parameter in training.parameters),
        kernels=ran,
        curve=curve,
    )
    return TrainedAdapter(model, base.id, told)


def _with_lora(base: Base, params: Adapter) -> PeftModel:
    check_fusable(base.model, target_paths(base.model, params.target_modules))
    try:
        with ignore_peft_warnings():
            return get_peft_model(base.model, lora_config(params))
    except ValueError as error:
        raise ParamsError(f"params.yaml: adapter.target_modules: {error}") from error
