"""Sentences as vectors, by a sentence-transformers folder.

Shapes: B texts, D dimensions.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from dlplora.data.checksums import embedder_files, embedder_sha256
from dlplora.data.prompts import plain_tokenizer
from dlplora.errors import ModelError, RouterError, errors_as
from dlplora.models import quiet_transformers
from dlplora.records.files import read_json
from dlplora.routing.base import Vectors
from dlplora.words import Advance

_EMBEDDER = "embedder"  # of a router's folder
_BATCH = 64
_OWN_MODULES = "sentence_transformers."


class Embedder:
    """A sentence embedder, in float32 on one device, and the folder that it was read from."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model = model
        self.folder = folder

    @classmethod
    def load(cls, folder: Path, *, device: torch.device) -> "Embedder":
        """Load a folder of sentence-transformers, from here alone and from safetensors alone.

        Raises `ModelError` if it cannot be used, or needs code of its own.
        """
        check_modules(folder)
        from sentence_transformers import SentenceTransformer

        quiet_transformers()
        with (
            errors_as(ModelError, f"{folder}: no usable embedder"),  # a broken one raises anything
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(0)  # a pooler that is not used is drawn where a file has none
            model = SentenceTransformer(
                str(folder),
                device=str(device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
        tokenizer: Any = model[0].tokenizer
        if isinstance(tokenizer, Tokenizer):  # of a table of words
            plain_tokenizer(tokenizer)
        else:
            tokenizer.split_special_tokens = True  # control tokens in texts are plain text
        return cls(model.eval().requires_grad_(False), folder)

    @classmethod
    def load_beside(cls, router: Path, sha256: str, *, device: torch.device) -> "Embedder":
        """Load the embedder that a router's folder holds; `RouterError` if it was changed."""
        folder = router / _EMBEDDER
        found = embedder_sha256(folder)
        if found != sha256:
            raise RouterError(
                f"{folder}: changed: found sha256 {found[:12]}…, the card of the router has "
                f"{sha256[:12]}…"
            )
        return cls.load(folder, device=device)

    def copy_beside(self, router: Path) -> str:
        """Copy its files into a router's folder, and return their hash for the card."""
        copy_embedder(self.folder, router / _EMBEDDER)
        return embedder_sha256(router / _EMBEDDER)

    def embed(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        normalise: bool,
        advance: Advance | None = None,
    ) -> Vectors:
        """Return a vector for each text behind the instruction (B, D), of length 1 if normalised.

        Texts of like length share a batch whatever their order, so that it changes nothing.
        A text longer than the model's window keeps its beginning. `advance(n)` is called after
        each batch.
        """
        order = sorted(range(len(texts)), key=lambda row: (len(texts[row]), texts[row]))
        vectors_BD = np.zeros((len(texts), self.num_dimensions), dtype=np.float32)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            with torch.inference_mode():
                found_BD = self.forward([instruction + texts[row] for row in rows])
            vectors_BD[rows] = found_BD.float().cpu().numpy()
            if advance is not None:
                advance(len(rows))
        return unit(vectors_BD) if normalise else vectors_BD

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Map texts to vectors (B, D), with gradients where parameters want them.

        An embedder may say that the first D values of longer vectors are enough (`truncate_dim`).
        """
        features = self.model.preprocess(list(texts))
        on_device = {
            name: value.to(self.model.device) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }
        vectors_BD: Tensor = self.model(on_device)["sentence_embedding"]
        return vectors_BD[:, : self.num_dimensions]

    @property
    def num_dimensions(self) -> int:
        """The length of its vectors."""
        return int(self.model.get_embedding_dimension())

    @property
    def transformer(self) -> Any:
        """The transformer whose states are pooled; `ModelError` if there is none."""
        if not has_transformer(self.folder):
            raise ModelError(
                f"{self.folder}: begins with {type(self.model[0]).__name__}, expected a "
                f"transformer that can be trained"
            )
        return self.model[0].model


def unit(vectors_BD: Vectors) -> Vectors:
    """Scale vectors (B, D) to length 1; zero stays zero."""
    lengths = np.linalg.norm(vectors_BD, axis=1, keepdims=True)
    scaled: Vectors = vectors_BD / np.maximum(lengths, np.finfo(np.float32).tiny)
    return scaled


def copy_embedder(source: Path, target: Path) -> None:
    """Copy what is read of an embedder's folder, and nothing else."""
    for file in embedder_files(source):
        copied = target / file.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copied)


def check_modules(folder: Path) -> None:
    """Raise `ModelError` if an embedder has modules that are not of sentence-transformers."""
    if foreign := [name for name in _modules(folder) if not name.startswith(_OWN_MODULES)]:
        raise ModelError(f"{folder}: the module {foreign[0]} is code of its own, which is not run")


def has_transformer(folder: Path) -> bool:
    """Tell whether an embedder begins with a transformer, as most do, or with a table of words."""
    return all(name.endswith(".Transformer") for name in _modules(folder)[:1])


def _modules(folder: Path) -> list[str]:
    """Return the types of an embedder's modules; `ModelError` if they cannot be read."""
    with errors_as(ModelError, f"{folder}: no folder of sentence-transformers (modules.json)"):
        return [str(module["type"]) for module in read_json(folder / "modules.json")]
