"""The frozen base model, as every stage after `base_model` loads it."""

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from dlplora.attention import implementation_for
from dlplora.data.batches import Padded
from dlplora.data.prompts import ChatFormat
from dlplora.data.templates import ChatTemplate
from dlplora.errors import ModelError
from dlplora.records.base_card import read_base_card
from dlplora.runtime import Place

# Layers in which masks and positions alone decide what a token sees.
ATTENTIONS = {"full_attention", "sliding_attention"}
# How far a batch may be from its rows alone in float32, of their norm.
_GAP = 0.001


@dataclass(frozen=True)
class Base:
    """A loaded base model with the way to talk to it.

    `fingerprint` is the hash of the weights that it was made from, whatever dtype it has now.
    `template` renders chats of several turns.
    """

    model: PreTrainedModel
    chat: ChatFormat
    id: str
    fingerprint: str
    template: ChatTemplate

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

    @property
    def num_tokens(self) -> int:
        """How many tokens the model has embeddings for."""
        return num_embeddings(self.model)

    def room(self, prompt: Sequence[int]) -> float:
        """Return how many tokens the model can read and write behind a prompt."""
        return inf if self.context is None else self.context - len(prompt)

    @property
    def context(self) -> int | None:
        """How many tokens the model can read, or None if nothing bounds them."""
        return context_of(self.model)


def load_base(folder: Path, *, place: Place, trains: bool = False) -> Base:
    """Load a base model folder; with `trains` for training, whose fastest attention may differ.

    A model that has no such implementation of attention gets "eager", which all have.
    """
    quiet_transformers()
    card = read_base_card(folder)
    try:
        attention = implementation_for(place.device, trains=trains)
        model = _load_weights(folder, place.dtype, attention, card.trust_remote_code)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: no usable base model: {error}") from error
    chat = ChatFormat.load(folder)
    check_vocabulary(chat.tokenizer.get_vocab_size(), model, str(folder))
    model.requires_grad_(False).train(False).to(place.device)
    template = ChatTemplate(partial(AutoTokenizer.from_pretrained, folder, local_files_only=True))
    return Base(model, chat, card.id, card.fingerprint, template)


def _load_weights(
    folder: Path, dtype: torch.dtype, attention: str, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # refused by `whole_model`, by name
            output_loading_info=True,
        )
    except ValueError:  # transformers has other kinds of attention only for some models
        if attention == "eager":
            raise
        return _load_weights(folder, dtype, "eager", trust_remote_code)
    return whole_model(str(folder), *loaded)


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


def inner_model(model: nn.Module) -> Any:
    """Return transformers' model that PEFT wraps, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


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


def context_of(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read, or None if nothing bounds them.

    Of learned positions it is the size of their table, without the places that OPT leaves free.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "alibi", False):  # Falcon names a number there, too
        return None
    found: int | None = getattr(config, "max_position_embeddings", None)
    return found


def reads_apart(model: PreTrainedModel) -> bool:
    """Tell whether a model has to read each row by itself, and none may be padded.

    So it is if anything but masks and positions decides what a token sees: the states of
    convolutions, linear attention and state spaces take in padding, and chunks of attention count
    it. So it is, too, if the model cannot be told positions.
    """
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or [])
    taken = inspect.signature(model.forward).parameters.values()
    takes_positions = any(
        one.name == "position_ids" or one.kind == one.VAR_KEYWORD for one in taken
    )
    has_states = bool(getattr(model, "_is_stateful", False))
    return has_states or bool(layers - ATTENTIONS) or not takes_positions


def probe_rows(model: PreTrainedModel) -> list[list[int]]:
    """Return a few short rows of tokens, of unequal lengths and the same for every run."""
    draw = torch.Generator().manual_seed(0)
    size = num_embeddings(model)
    return [torch.randint(size, (length,), generator=draw).tolist() for length in (5, 9)]


def alone_logits(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    """Return the logits (S, V) of one row, by the model's own forward and nothing else."""
    ids_1S = torch.tensor([row], device=model.device)
    logits: Tensor = model(input_ids=ids_1S, use_cache=False).logits[0]
    return logits.float()


def check_alike(
    base: Base, what: str, found: Tensor, expected: Tensor, *, gap_of_16_bits: float
) -> None:
    """Raise `ModelError` if what is computed is not what the model's own forward computes."""
    gap = ((found - expected).norm() / expected.norm()).item()
    most = _GAP if base.model.dtype == torch.float32 else gap_of_16_bits
    if not gap <= most:  # nor NaN
        raise ModelError(
            f"{base.id}: models of type {base.model.config.model_type} cannot be used: {what} "
            f"differs from the model's own forward by {gap:.1%}, expected at most {most:.1%}"
        )


def quiet_transformers() -> None:
    """Keep transformers from drawing bars and printing advice between a stage's own lines."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def logits_at(
    model: torch.nn.Module, batch: Padded, keep_BS: Tensor, **arguments: object
) -> Tensor:
    """Run a causal LM and return its logits (n, V) at the n places where `keep_BS` is true.

    `keep_BS` is on the host, the batch on the model's device.
    """
    with head_at(model, keep_BS):
        output = model(
            input_ids=batch.ids_BS,
            position_ids=batch.positions_BS,
            **arguments,
        )
    logits: Tensor = output.logits[0]
    return logits


@contextmanager
def head_at(model: torch.nn.Module, keep_BS: Tensor) -> Iterator[None]:
    """Let a causal LM compute logits (1, n, V) at the n places where `keep_BS` is true alone.

    The output head is given those places alone – it is a fifth of a small model – by a hook in
    front of it, so that what a model does to its logits afterwards still happens. `keep_BS` is on
    the host: a device would have to tell it first how many places there are.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    thread = threading.get_ident()
    places_n = keep_BS.flatten().nonzero()[:, 0].to(next(model.parameters()).device)

    def select(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != thread:
            return inputs
        return (inputs[0].flatten(0, 1).index_select(0, places_n)[None],)

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
