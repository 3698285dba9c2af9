"""LoraHub: weights of all adapters for a task, found by a few of its examples, no gradients.

    A = Σ w_i √s_i A_i,  B = Σ w_i √s_i B_i,  w = argmin L(w) + α · mean |w_i|

The matrices A and B are summed apart, the search is nevergrad's NGOpt from w = 0 and the
regularisation a mean, as in the authors' code (arXiv 2307.13269, section 2); the root of the
scaling goes to each, so that the composed adapter's own is 1.

Shapes: N adapters, R rank, I inputs, O outputs.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nevergrad
import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model

from dlplora.adapters import LoraAdapter, LoraPair, WholeAdapter, peft_tensors, read_adapters
from dlplora.data.prompts import ChatFormat
from dlplora.models import Base
from dlplora.params.training import LoraHub
from dlplora.records.examples import Example
from dlplora.records.files import write_json, written_folder
from dlplora.training.loss import mean_loss
from dlplora.training.merging import check_alike
from dlplora.training.pairs import Pair, encode_pairs
from dlplora.training.warnings import ignore_peft_warnings
from dlplora.words import Advance

Weights = NDArray[np.float64]
_FOUND = "weights.json"


@dataclass(frozen=True)
class Found:
    """The weights (N,) found for a task, and its loss on the examples by none and by them."""

    weights: Weights
    loss_of_base: float
    loss: float


@dataclass(frozen=True)
class ComposedAdapters:
    """For each task an adapter composed of all, and what was found for it."""

    adapters: Mapping[str, WholeAdapter]
    found: Mapping[str, Found]

    def save(self, folder: Path) -> None:
        """Write PEFT's folder for each task, and all weights by task and adapter."""
        names = list(self.adapters)
        told = {
            task: {
                "loss_of_base": found.loss_of_base,
                "loss": found.loss,
                "weights": dict(zip(names, found.weights.tolist(), strict=True)),
            }
            for task, found in self.found.items()
        }
        with written_folder(folder) as aside:
            for task, adapter in self.adapters.items():
                adapter.save(aside / task)
            write_json(aside / _FOUND, told)


def compose_by_examples(
    base: Base,
    folders: Mapping[str, Path],
    examples: Mapping[str, Sequence[Example]],
    *,
    params: LoraHub,
    seed: int,
    advance: Advance,
) -> ComposedAdapters:
    """Compose for each task an adapter of those of all tasks by a few examples, drawn by the seed.

    What is drawn for a task depends on it alone. Raises `AdapterError` if an adapter does not fit
    the base model or they differ in layers or ranks, and `DataError` if an answer leaves no room
    for its question.
    """
    pool = read_adapters(folders.values(), base_fingerprint=base.fingerprint)
    check_alike(pool, title="lorahub")
    config: LoraConfig = LoraConfig.from_pretrained(str(next(iter(folders.values()))))
    config.lora_alpha, config.alpha_pattern = config.r, config.rank_pattern  # a scaling of 1
    config.use_rslora, config.base_model_name_or_path = False, None
    with ignore_peft_warnings():
        model = get_peft_model(base.model, config).train(False)
    told: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    found, composed = {}, {}
    for task in folders:
        number = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big")
        rng = np.random.default_rng([seed, number])
        rows = rng.permutation(len(examples[task]))[: params.shots]
        encoded = encode_pairs(
            [examples[task][row] for row in rows], base.chat, max_tokens=params.max_tokens
        )
        shots = [answers[0] for answers in encoded]
        found[task] = find_weights(
            partial(shots_loss, model, pool, shots, base.chat),
            len(pool),
            params=params,
            seed=int(rng.integers(2**32)),
            advance=advance,
        )
        composed[task] = WholeAdapter.untrained(
            told,
            peft_tensors(compose(pool, found[task].weights)),
            task=task,
            base_id=base.id,
            base_fingerprint=base.fingerprint,
        )
    return ComposedAdapters(composed, found)


@torch.no_grad()
def shots_loss(
    model: PeftModel,
    pool: Sequence[LoraAdapter],
    shots: Sequence[Pair],
    chat: ChatFormat,
    weights: Weights,
) -> float:
    """Return the mean loss of examples under the weights (N,); the model's adapter gets them."""
    for path, pair in compose(pool, weights).items():
        layer: Any = model.get_submodule(f"base_model.model.{path}")
        layer.lora_A["default"].weight.copy_(pair.down_RI)
        layer.lora_B["default"].weight.copy_(pair.up_OR)
    return mean_loss(model, shots, chat).item()


def find_weights(
    loss: Callable[[Weights], float],
    num_adapters: int,
    *,
    params: LoraHub,
    seed: int,
    advance: Advance,
) -> Found:
    """Find the weights (N,) of the lowest regularised loss that NGOpt meets in so many steps."""
    start = np.zeros(num_adapters)
    space = nevergrad.p.Array(init=start, lower=-params.bound, upper=params.bound)
    space.random_state.seed(seed)
    optimiser = nevergrad.optimizers.NGOpt(space, budget=params.steps)
    loss_of_base = loss(start)
    found, lowest = Found(start, loss_of_base, loss_of_base), loss_of_base
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="COBYLA: Invalid")  # of its own making
        for _ in range(params.steps):
            candidate = optimiser.ask()
            weights = np.array(candidate.value)
            value = loss(weights)
            regularised = value + params.regularisation * float(np.abs(weights).mean())
            optimiser.tell(candidate, regularised)
            if regularised < lowest:
                found, lowest = Found(weights, loss_of_base, value), regularised
            advance(loss=lowest)
    return found


def compose(pool: Sequence[LoraAdapter], weights: Weights) -> dict[str, LoraPair]:
    """Return the weighted sums of the matrices A and of the matrices B on each layer."""
    composed = {}
    for path in pool[0].pairs:
        pairs = [adapter.pairs[path] for adapter in pool]
        weights_N = torch.tensor(
            [w * pair.scaling**0.5 for w, pair in zip(weights, pairs, strict=True)],
            dtype=torch.float32,
        )
        down_NRI = torch.stack([pair.down_RI.float() for pair in pairs])
        up_NOR = torch.stack([pair.up_OR.float() for pair in pairs])
        composed[path] = LoraPair(
            torch.einsum("n,nri->ri", weights_N, down_NRI),
            torch.einsum("n,nor->or", weights_N, up_NOR),
            scaling=1.0,
        )
    return composed
