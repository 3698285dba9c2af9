"""One LoRA adapter for one task, by PEFT, on a frozen base model.

The loss is the mean over answer tokens, the end token among them: the logits at a place predict
the token after it, and no prompt token is a target.

Shapes: B examples, S tokens after the common prefix, n labelled places.
"""

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from dlplora.adapters import WholeAdapter
from dlplora.data.batches import (
    batch_order,
    batches_in_order,
    pad_right,
    prefix_groups,
    shared_beginning,
)
from dlplora.data.prompts import ChatFormat
from dlplora.errors import DataError, ParamsError
from dlplora.models import Base, logits_at
from dlplora.params import Adapter
from dlplora.records.examples import Example
from dlplora.records.training import AdapterTraining
from dlplora.stage import Advance
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.lean import lean
from dlplora.training.loop import Schedule, fit
from dlplora.training.parts import Parts
from dlplora.training.quiet import quiet_peft

_PROMPT_LEAST = 8


@dataclass(frozen=True)
class Pair:
    """The tokens of a question and of the answer to learn, its end token included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


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

    Raises `DataError` if an answer leaves no room for the question within `max_tokens`, and
    `TrainingError` if the loss is not finite or not even one example fits into memory.
    """
    title = f"adapter {name}"
    torch.manual_seed(seed)
    model = _with_lora(base, params)
    pairs, num_cut = encode_pairs(train, base.chat, max_tokens=params.max_tokens)
    held_out, _ = encode_pairs(validation, base.chat, max_tokens=params.max_tokens)
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
        prompts_cut=num_cut,
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
    try:
        with quiet_peft():
            return get_peft_model(base.model, config)
    except ValueError as error:
        raise ParamsError(f"params.yaml: adapter.target_modules: {error}") from error


def encode_pairs(
    examples: Sequence[Example], chat: ChatFormat, *, max_tokens: int
) -> tuple[list[list[Pair]], int]:
    """Tokenise each example with each of its answers; return how many questions were cut."""
    encoded = []
    num_cut = 0
    for example in examples:
        answers = [(*chat.answer(answer), chat.end_id) for answer in example.answers]
        room = max_tokens - max(map(len, answers))
        if room < _PROMPT_LEAST:
            raise DataError(
                f"task {example.task}: an answer of {max_tokens - room} tokens leaves {room} of "
                f"adapter.max_tokens ({max_tokens}) for its question: {example.question[:60]!r}"
            )
        prompt = chat.prompt(example.question, max_tokens=room)
        num_cut += prompt.num_cut > 0
        encoded.append([Pair(prompt.ids, answer) for answer in answers])
    return encoded, num_cut


def mean_loss(
    model: torch.nn.Module, pairs: Sequence[Pair], chat: ChatFormat, *, always_share: bool = False
) -> Tensor:
    """Return the mean cross-entropy of the answer tokens of a batch.

    What all prompts of the batch begin with is computed once, and its keys and values are
    repeated for every row; the gradients of all rows sum into the one prefix. Dropout would drop
    the one prefix alike for all rows: then it is shared only if `always_share`.
    """
    prompts = [pair.prompt for pair in pairs]
    shared = 0
    if always_share or not _has_dropout(model):
        shared = shared_beginning(prompts)
    rows = [pair.prompt[shared:] + pair.answer for pair in pairs]
    padded = pad_right(rows, chat.pad_id)
    starts_B = torch.tensor([len(prompt) - shared for prompt in prompts])
    ends_B = torch.tensor([len(row) for row in rows])
    places_S = torch.arange(padded.ids_BS.shape[1])
    is_answer_BS = (places_S >= starts_B[:, None]) & (places_S < ends_B[:, None])
    keep_BS = torch.cat([is_answer_BS[:, 1:], torch.zeros(len(rows), 1, dtype=torch.bool)], 1)
    targets_n = padded.ids_BS[:, 1:][is_answer_BS[:, 1:]]

    device = next(model.parameters()).device
    cache = DynamicCache(config=cast(PreTrainedConfig, model.config))
    if shared:
        prefix = pad_right([prompts[0][:shared]], chat.pad_id).to(device)
        no_logits = torch.zeros_like(prefix.mask_BS, dtype=torch.bool)
        logits_at(model, prefix, no_logits, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    prefix_mask = torch.ones(len(rows), shared, dtype=padded.mask_BS.dtype)
    batch = dataclasses.replace(padded, positions_BS=padded.positions_BS + shared).to(device)
    logits_nV = logits_at(
        model,
        batch,
        keep_BS.to(device),
        attention_mask=torch.cat([prefix_mask.to(device), batch.mask_BS], 1),
        past_key_values=cache,
        use_cache=True,
    )
    return functional.cross_entropy(logits_nV.float(), targets_n.to(device))


def _has_dropout(model: torch.nn.Module) -> bool:
    return model.training and any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()
    )


def first_answers_loss(
    model: torch.nn.Module, pairs: Sequence[Sequence[Pair]], chat: ChatFormat, parts: Parts
) -> float:
    """Return the mean loss of the tokens of the first answers."""
    model.eval()
    first = sorted((options[0] for options in pairs), key=lambda pair: len(pair.prompt))
    return parts.mean(
        first,
        lambda part: mean_loss(model, part, chat),
        weight=lambda pair: len(pair.answer),
    )


def data_sha256_of(examples: Sequence[Example]) -> str:
    """Return a hash of examples, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(dataclasses.astuple(example)).encode())
    return digest.hexdigest()
