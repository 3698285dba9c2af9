"""What every training on answers shares, whatever parameters learn: batches, loss, speed."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from peft import LoraConfig
from torch import nn

from dlplora.data.batches import batch_order, prefix_groups
from dlplora.data.prompts import ChatFormat
from dlplora.kernels.choice import Kernel, use_kernels
from dlplora.models import Base
from dlplora.params.training import Adapter
from dlplora.records.examples import Example
from dlplora.records.training import AdapterTraining, Curve
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.loop import Schedule, fit
from dlplora.training.loss import mean_loss
from dlplora.training.micro_batches import MicroBatches
from dlplora.training.pairs import Pair
from dlplora.words import Advance, KernelChoice


class AnswerTraining:
    """The training of those parameters of a model that take gradients; `title` names it."""

    def __init__(
        self,
        model: nn.Module,
        chat: ChatFormat,
        *,
        params: Adapter,
        kernels: KernelChoice,
        title: str,
    ) -> None:
        self._model = model
        self._chat = chat
        self._params = params
        self._title = title
        self._micro_batches = MicroBatches(params.batch_size, params.micro_batch_size, title)
        self._kernels = kernels
        self.parameters = [one for one in model.parameters() if one.requires_grad]

    def validation_loss(
        self, pairs: Sequence[Sequence[Pair]], ran: Collection[Kernel] = ()
    ) -> float:
        """Return the mean loss of the tokens of the first answers; in `fit`, pass its `ran` on."""
        self._model.eval()
        return self._micro_batches.mean(
            sorted((options[0] for options in pairs), key=lambda pair: len(pair.prompt)),
            lambda rows: mean_loss(self._model, rows, self._chat, ran=ran),
            weight=lambda pair: len(pair.answer),
        )

    def fit(
        self,
        batch_of: Callable[[int, Sequence[int]], Sequence[Pair]],
        batches: Iterator[list[int]],
        validation_loss: Callable[[tuple[Kernel, ...]], float],
        *,
        checkpoint: Checkpoint | None,
        advance: Advance,
    ) -> tuple[Curve, tuple[Kernel, ...]]:
        """Train by `batch_of(step, rows)` with the rows of `batches`; raises as `loop.fit`.

        Returns the curve and the kernels in use, which `validation_loss` gets, too.

        `advance` gets the loss and how many tokens were learned in a second so far.
        """
        always_share = self._params.share_prefix == "always"
        started, num_tokens = time.monotonic(), 0

        def backward(step: int, rows: Sequence[int]) -> float:
            nonlocal num_tokens
            batch = batch_of(step, rows)
            num_tokens += sum(map(_length, batch))
            self._model.train()
            return self._micro_batches.backward(
                batch,
                lambda rows: mean_loss(
                    self._model, rows, self._chat, ran=ran, always_share=always_share
                ),
                weight=lambda pair: len(pair.answer),
                parameters=self.parameters,
            )

        with use_kernels(self._model, self._kernels) as ran:
            curve = fit(
                self.parameters,
                backward,
                batches,
                validation_loss=lambda: validation_loss(ran),
                schedule=Schedule.of(self._params),
                checkpoint=checkpoint,
                on_step=lambda point: advance(
                    loss=point.loss, tokens_per_second=num_tokens / (time.monotonic() - started)
                ),
                title=self._title,
            )
        return curve, ran


def first_lengths(pairs: Sequence[Sequence[Pair]]) -> list[int]:
    """Return how many tokens each example has with its first answer."""
    return [_length(options[0]) for options in pairs]


def like_batches(
    pairs: Sequence[Sequence[Pair]], batch_size: int, *, seed: int
) -> Iterator[list[int]]:
    """Yield batches of rows for ever, each of like lengths and beginnings."""
    groups = prefix_groups([options[0].prompt for options in pairs], batch_size)
    return batch_order(first_lengths(pairs), batch_size, seed=seed, groups=groups)


def _length(pair: Pair) -> int:
    return len(pair.prompt) + len(pair.answer)


def lora_config(params: Adapter, *, fan_in_fan_out: bool = False) -> LoraConfig:
    """Return PEFT's configuration of an adapter."""
    return LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=list(params.target_modules),
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
    )


def training_of(
    task: str,
    base: Base,
    train: Sequence[Example],
    validation: Sequence[Example],
    *,
    pairs: Sequence[Sequence[Pair]],
    num_parameters: int,
    kernels: Sequence[str],
    curve: Curve,
) -> AdapterTraining:
    """Describe how an adapter came to be; `pairs` are the tokens of what it was trained on."""
    digest = hashlib.sha256()
    for example in (*train, *validation):
        digest.update(repr(dataclasses.astuple(example)).encode())
    return AdapterTraining(
        task=task,
        base_fingerprint=base.fingerprint,
        is_imported=False,
        data_sha256=digest.hexdigest(),
        num_examples=len(train),
        num_parameters=num_parameters,
        longest_answer_tokens=max(len(pair.answer) for options in pairs for pair in options),
        kernels=tuple(kernels),
        curve=curve,
    )
