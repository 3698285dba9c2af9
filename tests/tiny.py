"""Tiny real models, tokenizers, adapters and tasks, made at test time from a seed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dlplora.data.checksums import folder_sha256
from dlplora.data.prompts import ChatFormat
from dlplora.data.templates import ChatTemplate, render_frame
from dlplora.models import Base, quiet_transformers
from dlplora.records.base_card import BaseCard, Frame, write_base_card
from tests.device import device

_TEXT = (
    "what is the colour opposite of sum word say a b c d e f g red green blue grey up down left "
    "right hot cold big small yes no one two three four five six seven eight nine ten plus minus "
    "which user assistant system ? ! . , : ; ( ) / -"
)
WORDS = _TEXT.split()
SPECIAL = ["<unk>", "<pad>", "<end>", "<turn>"]
TEMPLATE = (
    "{% for message in messages %}<turn> {{ message['role'] }} : {{ message['content'] }} <end> "
    "{% endfor %}{% if add_generation_prompt %}<turn> assistant : {% endif %}"
)
FAN_IN_FAN_OUT = {
    "llama": False,
    "qwen2": False,
    "phi3": False,
    "sliding": False,
    "gpt2": True,
}  # Conv1D holds Wᵀ
TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "phi3": ["qkv_proj", "down_proj"],
    "sliding": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_fc"],
}
# A model with states besides keys and values reads each row by itself.
ALL_TARGETS = TARGETS | {"lfm2": ["q_proj", "in_proj"]}


def tiny_tokenizer(
    *, template: str | None = TEMPLATE, lines: bool = False
) -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer with a chat template; with `lines` a line break is a word."""
    words = [*SPECIAL, *dict.fromkeys(WORDS)]
    if lines:
        words[-1] = "\n"
    raw = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = (
        pre_tokenizers.Split(" ", "removed") if lines else pre_tokenizers.WhitespaceSplit()
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = template
    return tokenizer


def _vocabulary() -> dict[str, Any]:
    return {
        "vocab_size": len(tiny_tokenizer()),
        "eos_token_id": 2,
        "pad_token_id": 1,
        "bos_token_id": None,
    }


def tiny_sizes(hidden: int = 16) -> dict[str, Any]:
    """Return what the configuration of a tiny model says, for most of transformers' classes."""
    return _vocabulary() | {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }


def tiny_model(kind: str = "llama", *, seed: int = 0, hidden: int = 16) -> PreTrainedModel:
    """Make a seeded two-layer model in float32, with the same weights on every device."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(
            n_embd=hidden,
            n_layer=2,
            n_head=2,
            n_positions=128,
            tie_word_embeddings=False,
            **_vocabulary(),
        )
        model: PreTrainedModel = GPT2LMHeadModel(config)
    else:
        sizes = tiny_sizes(hidden)
        if kind == "sliding":  # each token looks at so many
            sizes["sliding_window"] = 6
        if kind == "lfm2":  # has a state besides keys and values
            kinds = ["full_attention", "conv", "full_attention"]
            sizes |= {"layer_types": kinds, "num_hidden_layers": 3, "conv_L_cache": 3}
            sizes["tie_word_embeddings"] = False
        classes = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "phi3": (Phi3Config, Phi3ForCausalLM),
            "sliding": (MistralConfig, MistralForCausalLM),
            "lfm2": (Lfm2Config, Lfm2ForCausalLM),
        }
        config_class, model_class = classes[kind]
        model = model_class(config_class(**sizes))
    with torch.no_grad():  # larger than at birth, so that adapters and prompts matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        model.get_output_embeddings().weight.mul_(10)  # so that it can be sure of a token
    return model.eval().requires_grad_(False).to(device())


def byte_level(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes with two control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = template
    return tokenizer


FRAME = Frame("", "", (), 2, 1, (0, 1, 2, 3))  # of a tokenizer without a template


def chat_of(tokenizer: PreTrainedTokenizerFast, system: str | None = "") -> ChatFormat:
    """Return the format of a base model with a tokenizer."""
    return ChatFormat(tokenizer.backend_tokenizer, render_frame(tokenizer, system))


def tiny_base(kind: str = "llama", *, seed: int = 0, lines: bool = False) -> Base:
    """Make a loaded base model with its chat format."""
    tokenizer = tiny_tokenizer(lines=lines)
    template = ChatTemplate(lambda: tokenizer)
    return Base(tiny_model(kind, seed=seed), chat_of(tokenizer), "tiny", "f" * 64, template)


def write_tiny_folder(
    folder: Path, *, seed: int = 0, hidden: int = 16, positions: int = 256
) -> str:
    """Write a transformers folder of a tiny Llama; return the SHA-256 that pins it."""
    quiet_transformers()
    model = tiny_model(seed=seed, hidden=hidden)
    model.config.max_position_embeddings = positions
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder_sha256(folder, with_code=False)


def write_tiny_tokenizer(folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write the part of a base model's folder that routers read: tokenizer and card."""
    folder.mkdir(parents=True, exist_ok=True)
    (tokenizer or tiny_tokenizer().backend_tokenizer).save(str(folder / "tokenizer.json"))
    frame = render_frame(tiny_tokenizer(), "")
    write_base_card(folder, BaseCard("tiny", "f" * 64, frame, 256, trust_remote_code=False))
    return folder


def write_raw(file: Path, items: Sequence[dict[str, object]]) -> None:
    """Write a raw file of questions and answers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(items)), encoding="utf-8")


def opposites(count: int = 80, *, start: int = 0) -> list[dict[str, object]]:
    """Make free-answer items: `what is the opposite of up a b` → down."""
    pairs = {"up": "down", "left": "right", "hot": "cold", "big": "small"}
    return [
        {"Q": f"what is the opposite of {word} {_tail(place)} ?", "A": pairs[word]}
        for place in range(start, start + count)
        for word in [list(pairs)[place % len(pairs)]]
    ]


def choices(count: int = 80, *, start: int = 0) -> list[dict[str, object]]:
    """Make multiple-choice items: `which colour : one a b` → the colour of the number."""
    colours = {"one": "red", "two": "green", "three": "blue", "four": "grey"}
    return [
        {
            "Q": f"which colour : {word} {_tail(place)} ?",
            "A": colours[word],
            "options": list(colours.values()),
        }
        for place in range(start, start + count)
        for word in [list(colours)[place % len(colours)]]
    ]


def _tail(place: int) -> str:
    letters = "abcdefg"
    digits = []
    for _ in range(4):
        place, digit = divmod(place, len(letters))
        digits.append(letters[digit])
    return " ".join(digits)


def step_problems(count: int = 120) -> list[dict[str, object]]:
    """Make problems whose answers tell step by step how they come about, behind a mark the result.

    The longest have 24 steps, some 400 tokens.
    """
    problems: list[dict[str, object]] = []
    for number in range(count):
        total = start = 3 + number % 50
        gifts = [1 + (number * 7 + friend * 5) % 9 for friend in range(2 + number % 23)]
        steps = []
        for friend, gift in enumerate(gifts, start=1):
            steps.append(f"After friend {friend} she has {total} + {gift} = {total + gift}.")
            total += gift
        told = ", ".join(map(str, gifts))
        problems.append(
            {
                "question": f"Ann has {start} marbles. Her friends give her {told} more. How many "
                f"marbles has she at the end?",
                "answer": "\n".join([*steps, f"#### {total}"]),
            }
        )
    return problems
