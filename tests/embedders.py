"""A tiny seeded sentence embedder, as a folder, and one that gives the vectors it was told."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import processors
from transformers import BertConfig, BertModel

from dlplora.data.checksums import embedder_sha256
from dlplora.models import quiet_transformers
from dlplora.routing.base import Classifier, Vectors
from dlplora.routing.build import load_classifier
from dlplora.routing.embedding import Embedder, unit
from tests.device import device
from tests.tiny import tiny_tokenizer, write_tiny_tokenizer

HIDDEN, WINDOW = 16, 12
MODULES = ["Transformer", "Pooling", "Normalize"]


class SavedClassifier(Classifier, Protocol):
    """A classifier that can be saved."""

    def save(self, folder: Path) -> None:
        """Write a router's folder."""


def write_tiny_embedder(folder: Path, *, seed: int = 0, modules: Sequence[str] = MODULES) -> str:
    """Write a folder of sentence-transformers around a tiny BERT; return what pins it."""
    quiet_transformers()
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<turn> $A <end>", special_tokens=[("<turn>", 3), ("<end>", 2)]
    )
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * HIDDEN,
            max_position_embeddings=64,
            pad_token_id=1,
        ),
        add_pooling_layer=False,
    )
    with torch.no_grad():  # larger than at birth, so that words matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    _write(
        folder / "modules.json",
        [
            {"idx": place, "name": str(place), "path": paths[name], "type": f"{_PACKAGE}.{name}"}
            for place, name in enumerate(modules)
        ],
    )
    _write(folder / "sentence_bert_config.json", {"max_seq_length": WINDOW, "do_lower_case": False})
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True}
    _write(folder / "1_Pooling/config.json", pooling)
    return embedder_sha256(folder)


_PACKAGE = "sentence_transformers.models"


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")


class ToldEmbedder(Embedder):
    """An embedder that gives the vector of a text that it was told; instructions go in front."""

    def __init__(self, vectors: Mapping[str, Sequence[float]]) -> None:
        super().__init__(None, Path("told"))
        self.vectors = vectors

    def embed(
        self,
        texts: Sequence[str],
        *,
        instruction: str = "",
        normalise: bool,
        advance: Callable[..., None] | None = None,
    ) -> Vectors:
        found = np.array([self.vectors[instruction + text] for text in texts], dtype=np.float32)
        return unit(found) if normalise else found


TEXTS = ["say red", "say blue", "what is up ?", "what is left ?"]
TASKS_OF_TEXTS = ["colours"] * 2 + ["opposites"] * 2


def tiny_embedder(folder: Path) -> tuple[Embedder, Vectors]:
    """Return a tiny embedder, and the vectors that it gives `TEXTS`."""
    write_tiny_embedder(folder)
    embedder = Embedder.load(folder, device=device())
    return embedder, embedder.embed(TEXTS, normalise=True)


def check_saved_router(made: SavedClassifier, folder: Path) -> Classifier:
    """Save a router of the tasks of `TEXTS`, read it without its embedder's folder, and return it.

    It has to be as sure of everything as the one that was saved.
    """
    base = write_tiny_tokenizer(folder / "base")
    (folder / "router").mkdir()
    made.save(folder / "router")
    (folder / "embedder").rename(folder / "gone")
    loaded = load_classifier(folder / "router", base=base, tasks=["opposites", "colours"])
    asked = [*TEXTS, "say green", "one plus two"]
    assert np.array_equal(loaded.probabilities(asked), made.probabilities(asked))
    return loaded
