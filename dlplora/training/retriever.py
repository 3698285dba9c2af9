"""A sentence embedder trained further to put questions of one task together, by InfoNCE.

Shapes: B texts, D dimensions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dlplora.data.balance import Labelled
from dlplora.params.routing import TunedEmbedder
from dlplora.records.files import write_json, written_folder
from dlplora.records.training import Curve, curve_to_json
from dlplora.routing.embedding import Embedder, copy_embedder
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.loop import Schedule, fit
from dlplora.words import Advance


@dataclass(frozen=True)
class Tuned:
    """An embedder after its training, the tasks that it learned from, and its curve."""

    embedder: Embedder
    tasks: Sequence[str]
    curve: Curve

    def save(self, folder: Path) -> None:
        """Write an embedder's folder, with training.json beside."""
        with written_folder(folder) as aside:
            copy_embedder(self.embedder.folder, aside)
            for old in aside.glob("*.safetensors*"):
                old.unlink()
            self.embedder.transformer.save_pretrained(aside)
            told = {"tasks": sorted(self.tasks), "curve": curve_to_json(self.curve)}
            write_json(aside / "training.json", told)


def tune_embedder(
    embedder: Embedder,
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    *,
    params: TunedEmbedder,
    instruction: str,
    seed: int,
    checkpoint: Checkpoint | None,
    advance: Advance,
) -> Tuned:
    """Train the transformer of an embedder, without dropout, and keep the best on validation.

    LoraRetriever (arXiv 2402.09997, section 3.2): positives are of the same task, negatives of
    the others in the batch. `advance` is called after each step.
    """
    labels = sorted({row.task for row in train})
    targets, held_out = (
        torch.tensor([labels.index(row.task) for row in rows]) for rows in (train, validation)
    )

    def loss_of(rows: Sequence[Labelled], targets_B: Tensor) -> Tensor:
        vectors_BD = embedder.forward([instruction + row.text for row in rows])
        return info_nce(vectors_BD, targets_B.to(vectors_BD.device), temperature=params.temperature)

    def backward(_: int, drawn: Sequence[int]) -> float:
        loss = loss_of([train[row] for row in drawn], targets[list(drawn)])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    @torch.no_grad()
    def validation_loss() -> float:
        return loss_of(validation, held_out).item()

    parameters = list(embedder.transformer.requires_grad_(True).parameters())
    curve = fit(
        parameters,
        backward,
        balanced_batches(targets.numpy(), params.batch_size, seed=seed),
        validation_loss=validation_loss,
        schedule=Schedule.of(params),
        checkpoint=checkpoint,
        on_step=lambda point: advance(loss=point.loss),
        title="tuned_embedder",
    )
    embedder.transformer.requires_grad_(False)
    return Tuned(embedder, labels, curve)


def info_nce(vectors_BD: Tensor, targets_B: Tensor, *, temperature: float) -> Tensor:
    """Return the mean of −log(e^s⁺ / (e^s⁺ + Σ e^s⁻)) over all ordered pairs of one task.

    s is the cosine over the temperature; the sum runs over the texts of other tasks.
    """
    unit_BD = functional.normalize(vectors_BD, dim=1)
    similarities_BB = unit_BD @ unit_BD.T / temperature
    same_BB = targets_B[:, None] == targets_B[None, :]
    negatives_B = similarities_BB.masked_fill(same_BB, -torch.inf).logsumexp(1)
    losses_BB = functional.softplus(negatives_B[:, None] - similarities_BB)
    itself_BB = torch.eye(len(unit_BD), dtype=torch.bool, device=unit_BD.device)
    return losses_BB[same_BB & ~itself_BB].mean()


def balanced_batches(
    targets: NDArray[np.int64], batch_size: int, *, seed: int
) -> Iterator[list[int]]:
    """Yield batches of rows for ever, each with as many of every task, at least two."""
    rng = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(targets == target) for target in np.unique(targets)]
    each = max(2, batch_size // len(rows_of))
    while True:
        drawn = [rng.choice(rows, min(each, len(rows)), replace=False) for rows in rows_of]
        yield np.concatenate(drawn).tolist()
