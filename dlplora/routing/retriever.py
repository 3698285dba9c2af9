"""LoraRetriever (arXiv 2402.09997): the adapters whose embeddings are nearest to the text's.

An adapter's embedding is the mean over a few training inputs of its task, so that a new adapter
needs no training of a router. Shapes: B texts, N tasks, D dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import softmax

from dlplora.data.balance import draw
from dlplora.errors import RouterError, choices
from dlplora.params.routing import Index
from dlplora.params.systems import TopK, TopP
from dlplora.records.files import atomic_write
from dlplora.records.router_card import ROUTER_WEIGHTS, write_router_card
from dlplora.records.routes import Route
from dlplora.routing.base import Probabilities, Vectors, select
from dlplora.routing.embedding import Embedder, unit
from dlplora.runtime import best_place

Similarities = NDArray[np.float64]


def embed_adapter(
    embedder: Embedder, questions: Sequence[str], *, index: Index, seed: int
) -> Vectors:
    """Return the embedding of a task's adapter (D,): the mean of E(instruction + x).

    As many training inputs as the index says are drawn, or all if there are fewer (section 3.2 of
    the paper; 20 in its code). The mean is not scaled to length 1.
    """
    count = min(index.inputs, len(questions))
    rows = draw(len(questions), count, np.random.default_rng(seed))
    vectors_BD = embedder.embed(
        [questions[row] for row in rows], instruction=index.instruction, normalise=False
    )
    mean_D: Vectors = vectors_BD.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean_D


def write_index(file: Path, embedding_of: Mapping[str, Vectors]) -> None:
    """Write the embedding (D,) of a task's adapter by each embedder."""
    with atomic_write(file) as aside:
        save_file(dict(sorted(embedding_of.items())), aside)


def read_indexes(folder: Path, tasks: Sequence[str], *, embedder: str) -> Vectors:
    """Read the embeddings of tasks by one embedder (N, D); `RouterError` if one is missing."""
    rows = []
    for task in tasks:
        file = folder / f"{task}.safetensors"
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise RouterError(f"{file}: no usable index: {error}") from error
        if embedder not in found:
            raise RouterError(f"{file}: not by the embedder {embedder}; by {choices(found)}")
        rows.append(found[embedder])
    return np.stack(rows)


@dataclass(frozen=True)
class Retriever:
    """An embedder and the embeddings of the adapters that it finds.

    The similarity of a text and an adapter is their cosine (section 3.2), or the inner product of
    E(instruction + x) and the mean, neither scaled (the released code). Probabilities are what
    InfoNCE trains: a softmax of the similarities over the temperature.
    """

    embedder: Embedder
    labels: tuple[str, ...]
    means_ND: Vectors
    instruction: str
    similarity: Literal["cosine", "inner_product"]
    temperature: float

    def similarities(self, texts: Sequence[str]) -> Similarities:
        """Return how similar each text is to each adapter (B, N)."""
        means_ND = self._unit_means if self.similarity == "cosine" else self.means_ND
        return search(self.vectors(texts), means_ND)

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return the embeddings of texts behind the instruction (B, D), of length 1 for cosines."""
        return self.embedder.embed(
            texts, instruction=self.instruction, normalise=self.similarity == "cosine"
        )

    @cached_property
    def _unit_means(self) -> Vectors:
        return unit(self.means_ND)

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Return the probability of each task (B, N)."""
        return self.posterior(self.similarities(texts))

    def posterior(self, similarities_BN: Similarities) -> Probabilities:
        """Turn similarities into probabilities (B, N)."""
        result: Probabilities = softmax(similarities_BN / self.temperature, axis=1)
        return result

    def save(self, folder: Path) -> None:
        """Write the embeddings, router.json and the embedder."""
        save_file({"means": self.means_ND}, folder / ROUTER_WEIGHTS)
        card = {
            "kind": "retriever",
            "labels": list(self.labels),
            "base_fingerprint": None,
            "embedder_sha256": self.embedder.copy_beside(folder),
            "instruction": self.instruction,
            "similarity": self.similarity,
            "temperature": self.temperature,
        }
        write_router_card(folder, card)

    @classmethod
    def load(cls, folder: Path, card: Mapping[str, Any]) -> "Retriever":
        """Read what `save` wrote beside its card."""
        return cls(
            Embedder.load_beside(folder, card["embedder_sha256"], device=best_place().device),
            tuple(card["labels"]),
            load_file(folder / ROUTER_WEIGHTS)["means"],
            instruction=card["instruction"],
            similarity=card["similarity"],
            temperature=card["temperature"],
        )


@dataclass(frozen=True)
class RetrievalRouter:
    """A router that keeps the adapters most similar to a text.

    Confidence is the probability of the first.
    """

    retriever: Retriever
    selection: TopP | TopK

    def route(self, texts: Sequence[str]) -> list[Route]:
        """Return one route for each text."""
        similarities_BN = self.retriever.similarities(texts)
        posterior_BN = self.retriever.posterior(similarities_BN)
        alike = isinstance(self.selection, TopK) and self.selection.weights == "equal"
        ranked_BN = similarities_BN if alike else posterior_BN  # probabilities may round to ties
        return [
            replace(
                select(ranked_N, self.retriever.labels, self.selection),
                confidence=float(posterior_N.max()),
            )
            for ranked_N, posterior_N in zip(ranked_BN, posterior_BN, strict=True)
        ]


def search(vectors_BD: Vectors, means_ND: Vectors) -> Similarities:
    """Return the inner product of each text's vector with each adapter's (B, N).

    The search is exact: docs/log.md has its time over 10,000 adapters.
    """
    found_BN = torch.from_numpy(vectors_BD) @ torch.from_numpy(means_ND).T
    similarities_BN: Similarities = found_BN.numpy().astype(np.float64)
    return similarities_BN
