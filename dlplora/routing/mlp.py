"""The mini-MLP router of DLP-LoRA (arXiv 2410.01497): 4 layers over the mean of token embeddings.

Shapes: B texts, T tokens of all texts, N tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from dlplora.data.prompts import plain_tokenizer
from dlplora.errors import ParamsError, RouterError
from dlplora.records.base_card import read_base_card
from dlplora.records.files import file_sha256
from dlplora.records.router_card import ROUTER_WEIGHTS, write_router_card
from dlplora.routing.base import Probabilities, Vectors

_NUM_LAYERS = 4
_BATCH = 256
_TOKENIZER = "tokenizer.json"


class MiniMlp(nn.Module):
    """Mean of token embeddings, then four linear layers with GELU between them.

    The embedding is as wide as the budget of parameters allows: the paper's mini-MLP has 5 M
    and does not publish its widths.
    """

    def __init__(self, *, vocabulary: int, embedding: int, hidden: int, num_labels: int) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(vocabulary, embedding, mode="mean")
        widths = [embedding, *[hidden] * (_NUM_LAYERS - 1), num_labels]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, ids_T: Tensor, starts_B: Tensor) -> Tensor:
        """Map the tokens of B texts, one after another, to logits (B, N)."""
        logits_BN: Tensor = self.layers(self.embed(ids_T, starts_B))
        return logits_BN


def embedding_width(*, budget: int, vocabulary: int, hidden: int, num_labels: int) -> int:
    """Return the widest embedding that keeps a `MiniMlp` within `budget` parameters."""
    above = (_NUM_LAYERS - 2) * (hidden * hidden + hidden) + hidden + (hidden + 1) * num_labels
    width = (budget - above) // (vocabulary + hidden)
    if width < 1:
        raise ParamsError(
            f"params.yaml: a mini-MLP of {budget:,} parameters cannot hold {vocabulary:,} tokens "
            f"and layers of {hidden}; raise `parameters` or lower `hidden`"
        )
    return width


@dataclass(frozen=True)
class MlpClassifier:
    """A trained mini-MLP with the tokenizer that it reads by."""

    model: MiniMlp
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    max_tokens: int

    def __post_init__(self) -> None:
        """Leave training."""
        self.model.eval()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts as the model reads them."""
        return encode(self.tokenizer, texts, max_tokens=self.max_tokens)

    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Map the tokens of texts to logits (B, N)."""
        logits_BN: Tensor = self.model(*bag(rows))
        return logits_BN

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Return the probability of each task (B, N)."""
        logits_BN = self.model.layers[-1](self._hidden(texts))
        result: Probabilities = logits_BN.double().softmax(1).numpy().astype(np.float64)
        return result

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return what the last layer reads of texts (B, D)."""
        result: Vectors = self._hidden(texts).numpy()
        return result

    def _hidden(self, texts: Sequence[str]) -> Tensor:
        rows = self.encode(texts)
        bags = [bag(rows[start : start + _BATCH]) for start in range(0, len(rows), _BATCH)]
        hidden_BD = [self.model.layers[:-1](self.model.embed(*parts)) for parts in bags]
        return torch.cat(hidden_BD)

    def save(self, folder: Path, *, base: Path) -> None:
        """Write router.safetensors and router.json."""
        save_file(self.model.state_dict(), folder / ROUTER_WEIGHTS)
        card = {
            "kind": "mlp",
            "labels": list(self.labels),
            "base_fingerprint": read_base_card(base).fingerprint,
            "tokenizer": file_sha256(base / _TOKENIZER),
            "max_tokens": self.max_tokens,
        }
        write_router_card(folder, card)

    @classmethod
    def load(cls, folder: Path, card: Mapping[str, Any], *, base: Path) -> "MlpClassifier":
        """Read what `save` wrote beside its card; `RouterError` if the tokenizer is another one."""
        if card["tokenizer"] != file_sha256(base / _TOKENIZER):
            raise RouterError(f"{folder}: trained with another tokenizer than {base / _TOKENIZER}")
        state = load_file(folder / ROUTER_WEIGHTS)
        vocabulary, embedding = state["embed.weight"].shape
        model = MiniMlp(
            vocabulary=vocabulary,
            embedding=embedding,
            hidden=len(state["layers.0.weight"]),
            num_labels=len(card["labels"]),
        )
        model.load_state_dict(state)
        tokenizer = read_tokenizer(base)
        return cls(model, tokenizer, tuple(card["labels"]), max_tokens=card["max_tokens"])


def read_tokenizer(base: Path) -> Tokenizer:
    """Read a base model's tokenizer, to read texts as plain text."""
    return plain_tokenizer(Tokenizer.from_file(str(base / _TOKENIZER)))


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
    """Tokenise texts without special tokens; a long one keeps its beginning and its end."""
    rows = [
        encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ]
    return [cut(row, max_tokens) for row in rows]


def cut(row: list[int], max_tokens: int) -> list[int]:
    """Cut tokens out of the middle of a long text."""
    half = max_tokens // 2
    return row if len(row) <= max_tokens else row[: max_tokens - half] + row[len(row) - half :]


def bag(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Lay token lists one after another (T,), with the place where each begins (B,)."""
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    return torch.tensor(
        [token for row in rows for token in row], dtype=torch.long
    ), torch.from_numpy(starts)
