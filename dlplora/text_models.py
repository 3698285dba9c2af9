"""Which checkpoints hold a language model that reads and writes text alone, and where in them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from dlplora.errors import ModelError


def auto_class(folder: Path, *, trust_remote_code: bool) -> Any:
    """Return the class of transformers that loads a folder whole.

    Raises `ModelError` if it is quantised, or no model that goes on writing what it has read.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    kind = config.model_type
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(f"{folder}: is quantised ({method}); expected weights of 16 or 32 bits")
    if config.is_encoder_decoder:
        raise ModelError(f"{folder}: {kind} is an encoder-decoder; expected a decoder alone")
    if _is_causal(config) or "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return AutoModelForCausalLM
    text = config.get_text_config(decoder=True)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and _is_causal(text):
        return AutoModelForImageTextToText
    of = "" if text is config else f", nor for its part {text.model_type}"
    raise ModelError(f"{folder}: transformers has no causal language model for the type {kind}{of}")


def text_part(model: Any) -> PreTrainedModel:
    """Return the language model of a multimodal one, with the same weights; another as it is."""
    whole: PreTrainedModel = model
    config = model.config.get_text_config(decoder=True)
    if config is model.config or not _is_causal(config):
        return whole
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    maker: Any = AutoModelForCausalLM
    with torch.device("meta"):  # its weights are replaced
        text = maker.from_config(config)
    if type(text.base_model) is not type(decoder) or head is None:
        return whole
    config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(head)
    text.generation_config = model.generation_config
    part: PreTrainedModel = text
    return part


def _is_causal(config: PreTrainedConfig) -> bool:
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
