"""A router by words and by meaning: TF-IDF and a sentence embedder vote together.

Shapes: B texts, N tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from dlplora.records.router_card import ROUTER_WEIGHTS, read_router_card, write_router_card
from dlplora.routing.base import Probabilities, Vectors, fit_temperature, softmax
from dlplora.routing.linear import LinearClassifier
from dlplora.routing.simple import TfidfClassifier

_WORDS, _MEANING = "words", "meaning"  # folders of a router's folder


@dataclass(frozen=True)
class EnsembleClassifier:
    """The normalised geometric mean of two classifiers' probabilities, over a temperature.

    A product of experts (Hinton, "Training Products of Experts by Minimizing Contrastive
    Divergence", 2002): what either finds unlikely is unlikely, so that a text which only one of
    them takes for a task's gets little confidence.
    """

    words: TfidfClassifier
    meaning: LinearClassifier
    temperature: float = 1.0

    @property
    def labels(self) -> tuple[str, ...]:
        """The tasks, in the order of the columns of `probabilities`."""
        return self.words.labels

    @property
    def num_parameters(self) -> int:
        """How many numbers were fitted."""
        return self.words.num_parameters + self.meaning.num_parameters

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Return the probability of each task (B, N)."""
        return softmax(self._scores(texts) / self.temperature)

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return the embeddings of texts (B, D), of length 1."""
        return self.meaning.vectors(texts)

    def calibrated(
        self, texts: Sequence[str], tasks: Sequence[str], *, strange: Sequence[str]
    ) -> "EnsembleClassifier":
        """Return the same with the temperature that held-out texts and texts of no task choose."""
        targets_B = [self.labels.index(task) for task in tasks]
        return replace(
            self, temperature=fit_temperature(self._scores(texts), targets_B, self._scores(strange))
        )

    def _scores(self, texts: Sequence[str]) -> Probabilities:
        """Return the mean logarithms of the probabilities (B, N)."""
        tiny = np.finfo(np.float64).tiny
        both = (self.words.probabilities(texts), self.meaning.probabilities(texts))
        scores_BN: Probabilities = np.mean([np.log(np.maximum(one, tiny)) for one in both], axis=0)
        return scores_BN

    def save(self, folder: Path) -> None:
        """Write both classifiers, each to a folder of its own, the temperature and router.json."""
        for name, member in ((_WORDS, self.words), (_MEANING, self.meaning)):
            (folder / name).mkdir()
            member.save(folder / name)
        save_file({"temperature": np.array([self.temperature])}, folder / ROUTER_WEIGHTS)
        card = {"kind": "ensemble", "labels": list(self.labels), "base_fingerprint": None}
        write_router_card(folder, card)

    @classmethod
    def load(cls, folder: Path) -> "EnsembleClassifier":
        """Read what `save` wrote."""
        words, meaning = folder / _WORDS, folder / _MEANING
        return cls(
            TfidfClassifier.load(words, read_router_card(words)),
            LinearClassifier.load(meaning, read_router_card(meaning)),
            float(load_file(folder / ROUTER_WEIGHTS)["temperature"][0]),
        )
