"""The encoder router of DLP-LoRA (arXiv 2410.01497): a classifier over a pretrained encoder.

The first token's last state → LayerNorm → Linear(hidden, N), as in the paper's code, which never
loads the pretrained weights that are loaded here.

Shapes: B texts, S tokens, N tasks.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from dlplora.data.batches import pad_right
from dlplora.data.prompts import plain_tokenizer
from dlplora.errors import ModelError, ParamsError, RouterError
from dlplora.models import quiet_transformers, whole_model
from dlplora.records.files import file_sha256
from dlplora.records.router_card import ROUTER_WEIGHTS, write_router_card
from dlplora.routing.base import Probabilities, Vectors
from dlplora.routing.mlp import cut
from dlplora.runtime import best_place

_BATCH = 64
_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"


class EncoderNetwork(nn.Module):
    """A normed linear layer over an encoder's state of the first token."""

    def __init__(self, encoder: PreTrainedModel, num_labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(encoder.config.hidden_size)
        self.classify = nn.Linear(encoder.config.hidden_size, num_labels)

    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Map the tokens of B texts to logits (B, N)."""
        logits_BN: Tensor = self.classify(self.features(rows))
        return logits_BN

    def features(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Map the tokens of B texts to the normed states of their first tokens (B, D)."""
        batch = pad_right(rows, self.encoder.config.pad_token_id or 0).to(
            self.classify.weight.device
        )
        output = self.encoder(input_ids=batch.ids_BS, attention_mask=batch.mask_BS)
        normed_BD: Tensor = self.norm(output.last_hidden_state[:, 0])
        return normed_BD


@dataclass(frozen=True)
class EncoderClassifier:
    """A trained encoder network with its own tokenizer."""

    model: EncoderNetwork
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
        logits_BN: Tensor = self.model(rows)
        return logits_BN

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """Return the probability of each task (B, N)."""
        logits_BN = self.model.classify(self._features(texts))
        result: Probabilities = logits_BN.double().softmax(1).cpu().numpy()
        return result

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str]) -> Vectors:
        """Return what the last layer reads of texts (B, D)."""
        result: Vectors = self._features(texts).cpu().numpy()
        return result

    def _features(self, texts: Sequence[str]) -> Tensor:
        """Return the states of first tokens (B, D); texts of like length share a batch."""
        rows = self.encode(texts)
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        features_BD = torch.empty(len(rows), self.model.norm.weight.numel())
        for start in range(0, len(order), _BATCH):
            part = order[start : start + _BATCH]
            features_BD[part] = self.model.features([rows[place] for place in part]).cpu()
        return features_BD.to(self.model.classify.weight.device)

    def save(self, folder: Path) -> None:
        """Write weights, configuration and tokenizer of the encoder, and router.json."""
        state = {
            name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()
        }
        save_file(state, folder / ROUTER_WEIGHTS)
        self.model.encoder.config.save_pretrained(folder)
        self.tokenizer.save(str(folder / _TOKENIZER))
        card = {
            "kind": "encoder",
            "labels": list(self.labels),
            "base_fingerprint": None,  # it reads no base model
            "max_tokens": self.max_tokens,
            "files": {name: file_sha256(folder / name) for name in (_CONFIG, _TOKENIZER)},
        }
        write_router_card(folder, card)

    @classmethod
    def load(cls, folder: Path, card: Mapping[str, Any]) -> "EncoderClassifier":
        """Read what `save` wrote beside its card; `RouterError` if a file was changed."""
        for name, sha256 in card["files"].items():
            if not (folder / name).is_file() or file_sha256(folder / name) != sha256:
                raise RouterError(f"{folder / name}: missing or changed since it was trained")
        config = AutoConfig.from_pretrained(folder)
        encoder = AutoModel.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32, **_without_pooler(config)
        )
        model = EncoderNetwork(encoder, len(card["labels"]))
        model.load_state_dict(load_file(folder / ROUTER_WEIGHTS))
        tokenizer = plain_tokenizer(Tokenizer.from_file(str(folder / _TOKENIZER)))
        model.to(best_place().device)
        return cls(model, tokenizer, tuple(card["labels"]), card["max_tokens"])


def load_encoder(folder: Path, *, max_tokens: int) -> PreTrainedModel:
    """Load an encoder's folder in float32, with every one of its pretrained weights.

    Raises `ModelError` if weights are missing or of another shape, or if the model's first token
    does not see the others; `ParamsError` if it cannot read `max_tokens`.
    """
    quiet_transformers()
    if not (folder / _CONFIG).is_file():
        raise ModelError(f"{folder}: found no {_CONFIG}; expected a transformers folder")
    try:
        config = AutoConfig.from_pretrained(folder)
        loaded: Any = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **_without_pooler(config),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: no usable encoder: {error}") from error
    encoder = whole_model(str(folder), *loaded)
    encoder.train(False)
    _check_first_token(folder, encoder, max_tokens=max_tokens)
    return encoder


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load an encoder folder's tokenizer, to read texts as plain text."""
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: no usable tokenizer: {error}") from error
    return plain_tokenizer(tokenizer)


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
    """Tokenise texts with the special tokens around them; a long one keeps beginning and end."""
    return [cut(encoding.ids, max_tokens) for encoding in tokenizer.encode_batch(list(texts))]


def _without_pooler(config: PreTrainedConfig) -> dict[str, bool]:
    """Return what leaves out a pooling layer that is not used, which many folders lack."""
    with torch.device("meta"):
        kind = type(AutoModel.from_config(config))  # type: ignore[no-untyped-call]
    has_pooler = "add_pooling_layer" in inspect.signature(kind).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


@torch.no_grad()
def _check_first_token(folder: Path, encoder: PreTrainedModel, *, max_tokens: int) -> None:
    """Refuse a model that cannot read so much, or whose first token sees nothing of the rest."""
    pad = encoder.config.pad_token_id or 0
    one, other = [token for token in range(3) if token != pad][:2]
    ids_BS = torch.full((2, max_tokens), one)
    ids_BS[1, -1] = other
    try:
        first_BH = encoder(input_ids=ids_BS).last_hidden_state[:, 0]
    except (IndexError, RuntimeError) as error:
        raise ParamsError(
            f"{folder}: cannot read {max_tokens} tokens ({error}); lower the router's max_tokens"
        ) from error
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder}: no encoder: {error}") from error
    if torch.equal(first_BH[0], first_BH[1]):
        raise ModelError(
            f"{folder}: no encoder: its first token sees nothing of those behind it; expected a "
            f"model such as BERT, ALBERT or RoBERTa"
        )
