"""The time of an exact search among many adapters, for one text and for a batch.

    python -m benchmarks.retrieval [--rounds 50]

A search goes from the texts' vectors to their routes, by LoraRetriever's router: cosines to all
adapters, their probabilities, and the three most similar of each text. The vectors, of 384
dimensions as of MiniLM, are drawn at random: an exact search takes the same time whatever they
are. Embedding the texts themselves is left out.

Writes benchmarks/results/retrieval.json.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.record import write_results
from benchmarks.timing import interleaved
from dlplora.params.systems import TopK
from dlplora.routing.base import Vectors
from dlplora.routing.embedding import Embedder, unit
from dlplora.routing.retriever import RetrievalRouter, Retriever
from dlplora.runtime import Place

DIMENSIONS = 384
ADAPTERS = (100, 1_000, 10_000, 100_000)
TEXTS = (1, 16)
NEAREST = TopK(k=3, weights="equal")


def drawn(count: int, seed: int) -> Vectors:
    """Draw unit vectors (count, D)."""
    rng = np.random.default_rng(seed)
    return unit(rng.standard_normal((count, DIMENSIONS), dtype=np.float32))


class Drawn(Embedder):
    """An embedder that has embedded its texts already."""

    def __init__(self, vectors_BD: Vectors) -> None:
        self.vectors_BD = vectors_BD

    def embed(self, texts: Sequence[str], **_: Any) -> Vectors:
        """Return as many vectors as texts."""
        return self.vectors_BD[: len(texts)]


def router_of(vectors_BD: Vectors, means_ND: Vectors) -> RetrievalRouter:
    """Build a router over so many adapters."""
    names = tuple(f"adapter_{number}" for number in range(len(means_ND)))
    retriever = Retriever(
        Drawn(vectors_BD), names, means_ND, instruction="", similarity="cosine", temperature=0.05
    )
    return RetrievalRouter(retriever, NEAREST)


def main() -> None:
    """Time searches in turns and write what they took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(2)
    found: dict[str, Any] = {}
    for count in ADAPTERS:
        router = router_of(drawn(max(TEXTS), 1), drawn(count, 0))
        works = {str(size): partial(router.route, [""] * size) for size in TEXTS}
        seconds = interleaved(works, rounds, f"{count} adapters")
        found[str(count)] = {
            f"{size}_texts": {
                "median_ms": round(1000 * statistics.median(part), 3),
                "fastest_ms": round(1000 * min(part), 3),
            }
            for size, part in seconds.items()
        }
    write_results(
        "retrieval",
        {"dimensions": DIMENSIONS, "adapters": found},
        place=Place(torch.device("cpu"), torch.float32),
        rounds=rounds,
        libraries=("numpy", "torch"),
    )


if __name__ == "__main__":
    main()
