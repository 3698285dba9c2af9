"""One LoRA adapter for one task, by PEFT, on a frozen base model."""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from dlplora.adapters import WholeAdapter
from dlplora.data.batches import (
    batch_order,
    batches_in_order,
    prefix_groups,
)
from dlplora.errors import ParamsError
from dlplora.lora.attach import check_fusable, target_paths
from dlplora.models import Base
from dlplora.params.training import Adapter
from dlplora.records.examples import Example
from dlplora.records.training import AdapterTraining
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.lean import lean
from dlplora.training.loop import Schedule, fit
from dlplora.training.loss import first_answers_loss, mean_loss
from dlplora.training.pairs import encode_pairs
from dlplora.training.parts import Parts
from dlplora.training.warnings import ignore_peft_warnings
from dlplora.words import Advance


class Speed:
    """Tokens of training data per second so far."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.num_tokens = 0

    def now(self) -> float:
        """Return tokens per second since the beginning."""
        return self.num_tokens / (time.monotonic() - self.started)


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
    in_order: bool = False,
    checkpoint: Checkpoint | None,
    advance: Advance,
) -> TrainedAdapter:
    """Train an adapter on examples; of n accepted answers, step s learns answer s mod n.

    `name` is that of its task, or its own if the examples are of several tasks. Batches are drawn
    by the seed, each of like lengths and beginnings, or are cut from the examples `in_order`.

    Raises `DataError` if an example is longer than `max_tokens`, and
    `TrainingError` if the loss is not finite or not even one example fits into memory.
    """
    title = f"adapter {name}"
    torch.manual_seed(seed)
    model = _with_lora(base, params)
    pairs = encode_pairs(train, base.chat, max_tokens=params.max_tokens)
    held_out = encode_pairs(validation, base.chat, max_tokens=params.max_tokens)
    lengths = [len(options[0].prompt) + len(options[0].answer) for options in pairs]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = Parts(params.batch_size, params.micro_batch_size, title)
    speed = Speed()
    always_share = params.share_prefix == "always"

    def backward(step: int, rows: Sequence[int]) -> float:
        batch = [pairs[row][step % len(pairs[row])] for row in rows]
        speed.num_tokens += sum(len(pair.prompt) + len(pair.answer) for pair in batch)
        model.train()
        return parts.backward(
            batch,
            lambda part: mean_loss(model, part, base.chat, always_share=always_share),
            weight=lambda pair: len(pair.answer),
            parameters=parameters,
        )

    with lean(model):
        curve = fit(
            parameters,
            backward,
            batches_in_order(lengths, params.batch_size)
            if in_order
            else batch_order(
                lengths,
                params.batch_size,
                seed=seed,
                groups=prefix_groups([options[0].prompt for options in pairs], params.batch_size),
            ),
            validation_loss=lambda: first_answers_loss(model, held_out, base.chat, parts),
            schedule=Schedule.of(params),
            checkpoint=checkpoint,
            on_step=lambda point: advance(loss=point.loss, tokens_per_second=speed.now()),
            title=title,
        )
    training = AdapterTraining(
        task=name,
        base_fingerprint=base.fingerprint,
        is_imported=False,
        data_sha256=data_sha256_of([*train, *validation]),
        num_examples=len(train),
        num_parameters=sum(parameter.numel() for parameter in parameters),
        longest_answer_tokens=max(len(pair.answer) for options in pairs for pair in options),
        curve=curve,
    )
    return TrainedAdapter(model, base.id, training)


def _with_lora(base: Base, params: Adapter) -> PeftModel:
    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=list(params.target_modules),
        task_type="CAUSAL_LM",
    )
    check_fusable(base.model, target_paths(base.model, params.target_modules))
    try:
        with ignore_peft_warnings():
            return get_peft_model(base.model, config)
    except ValueError as error:
        raise ParamsError(f"params.yaml: adapter.target_modules: {error}") from error


def data_sha256_of(examples: Sequence[Example]) -> str:
    """Return a hash of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(dataclasses.astuple(example)).encode())
    return digest.hexdigest()
