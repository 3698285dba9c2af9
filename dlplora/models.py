"""The frozen base model, as every stage after `base_model` loads it."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from dlplora.data.batches import Padded
from dlplora.data.prompts import ChatFormat
from dlplora.errors import ModelError
from dlplora.records.base_card import read_base_card
from dlplora.runtime import Place


@dataclass(frozen=True)
class Base:
    """A loaded base model with the way to talk to it.

    `fingerprint` is the hash of the weights that it was made from, whatever dtype it has now.
    """

    model: PreTrainedModel
    chat: ChatFormat
    id: str
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.device

    @property
    def context(self) -> int | None:
        """How many tokens the model reads, or None if nothing bounds that."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens at which generation stops."""
        config = self.model.generation_config
        named = [] if config is None or config.eos_token_id is None else config.eos_token_id
        listed = named if isinstance(named, list) else [named]
        return frozenset([*listed, self.chat.end_id])


def load_base(folder: Path, *, place: Place, attention: str) -> Base:
    """Load a base model folder; `attention` names transformers' implementation.

    Measured here: "eager" is the faster for training short prompts on a CPU, whose fused
    attention has a slow backward pass; "sdpa" for inference.
    """
    quiet_transformers()
    card = read_base_card(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=place.dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=card.trust_remote_code,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: no usable base model: {error}") from error
    model = whole_model(str(folder), *loaded)
    chat = ChatFormat.load(folder)
    check_vocabulary(chat.tokenizer.get_vocab_size(), model, str(folder))
    model.requires_grad_(False).train(False).to(place.device)
    return Base(model, chat, card.id, card.fingerprint)


def check_vocabulary(num_tokens: int, model: PreTrainedModel, title: str) -> None:
    """Raise `ModelError` if a tokenizer has tokens that the model has no embeddings for."""
    rows = num_embeddings(model)
    if num_tokens > rows:
        raise ModelError(
            f"{title}: the tokenizer has {num_tokens:,} tokens, the model {rows:,}; "
            f"they do not belong together"
        )


def num_embeddings(model: PreTrainedModel) -> int:
    """Return how many tokens a model has embeddings for; a tokenizer may have fewer."""
    return len(next(model.get_input_embeddings().parameters()))


def whole_model(title: str, model: PreTrainedModel, told: dict[str, Any]) -> PreTrainedModel:
    """Return a model if its files had all of its weights: transformers draws others at random."""
    mismatched = sorted(told["mismatched_keys"])
    if mismatched:
        name, found, expected = mismatched[0]
        raise ModelError(
            f"{title}: {name} is {' × '.join(map(str, found))}, its configuration says "
            f"{' × '.join(map(str, expected))}"
        )
    parameters = {name for name, _ in model.named_parameters()}
    if missing := sorted(parameters & set(told["missing_keys"])):
        raise ModelError(
            f"{title}: lacks {len(missing)} of the {len(parameters)} weights that its "
            f"configuration says, such as {missing[0]}"
        )
    return model


def quiet_transformers() -> None:
    """Keep transformers from drawing bars and printing advice between a stage's own lines."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def logits_at(
    model: torch.nn.Module, batch: Padded, keep_BS: Tensor, **arguments: object
) -> Tensor:
    """Run a causal LM and return its logits (n, V) at the n places where `keep_BS` is true.

    The output head is given those places alone – it is a fifth of a small model – by a hook in
    front of it, so that what a model does to its logits afterwards still happens.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    thread = threading.get_ident()

    def select(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][keep_BS][None],) if threading.get_ident() == thread else inputs

    hook = head.register_forward_pre_hook(select)
    try:
        output = model(
            input_ids=batch.ids_BS,
            position_ids=batch.positions_BS,
            **arguments,
        )
    finally:
        hook.remove()
    logits: Tensor = output.logits[0]
    return logits
