"""The frozen base model, as every stage after `base_model` loads it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
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
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=place.dtype, attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no usable base model: {error}") from error
    model.requires_grad_(False).train(False).to(place.device)
    chat = ChatFormat(tokenizer, card.system_prompt)
    return Base(model, chat, card.id, card.fingerprint)


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

    def select(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][keep_BS][None],)

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
