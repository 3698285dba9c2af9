"""Tiny seeded encoders of several families, with a word-level tokenizer, made at test time."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from dlplora.models import quiet_transformers
from tests.tiny import WORDS

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "albert": (AlbertConfig, AlbertModel, AlbertForMaskedLM),
    "bert": (BertConfig, BertModel, BertForMaskedLM),
    "roberta": (RobertaConfig, RobertaModel, RobertaForMaskedLM),
}
MOST_TOKENS = 24


def tiny_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Make a word-level tokenizer that puts <s> and </s> around a text."""
    words = [*SPECIAL, *dict.fromkeys(WORDS)]
    raw = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", bos_token="<s>"
    )


def tiny_encoder(kind: str, *, masked_lm: bool = False, seed: int = 0) -> PreTrainedModel:
    """Make a seeded two-layer encoder; as a masked LM it has no pooling layer."""
    torch.manual_seed(seed)
    config_class, plain, with_head = CLASSES[kind]
    sizes: dict[str, Any] = {
        "vocab_size": len(tiny_encoder_tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        # RoBERTa counts positions from behind the padding token's
        "max_position_embeddings": MOST_TOKENS + 2 * (kind == "roberta"),
    }
    if kind == "albert":
        sizes["embedding_size"] = 8
    model: PreTrainedModel = (with_head if masked_lm else plain)(config_class(**sizes))
    with torch.no_grad():  # larger than at birth, so that texts matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def write_tiny_encoder(folder: Path, kind: str, *, masked_lm: bool = False, seed: int = 0) -> Path:
    """Write a transformers folder of a tiny encoder with its tokenizer."""
    quiet_transformers()
    tiny_encoder(kind, masked_lm=masked_lm, seed=seed).save_pretrained(folder)
    tiny_encoder_tokenizer().save_pretrained(folder)
    return folder
