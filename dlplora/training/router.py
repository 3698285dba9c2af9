"""Routers trained on router data, each with how well it does on held-out questions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from dlplora.data.balance import Labelled
from dlplora.data.batches import batch_order
from dlplora.params import MlpRouter, TfidfRouter
from dlplora.records.files import write_json, written_folder
from dlplora.records.training import Curve, curve_to_json
from dlplora.routing.base import Classifier, calibration_error
from dlplora.routing.mlp import MiniMlp, MlpClassifier, bag, embedding_width, encode, read_tokenizer
from dlplora.routing.simple import fit_tfidf
from dlplora.stage import progress
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.loop import Schedule, fit


@dataclass(frozen=True)
class RouterQuality:
    """A router on the validation texts.

    `calibration_error` is the expected one over 15 equal bins of confidence; `confusion` counts
    texts by true task (rows) and first choice (columns), in the order of `labels`.
    """

    labels: tuple[str, ...]
    accuracy: float
    calibration_error: float
    confusion: tuple[tuple[int, ...], ...]
    num_parameters: int


@dataclass(frozen=True)
class TrainedRouter:
    """A classifier that can be saved, with its quality and, if it was optimised, its curve."""

    classifier: Classifier
    save_weights: Callable[[Path], None]
    quality: RouterQuality
    curve: Curve | None

    def save(self, folder: Path) -> None:
        """Write the router's files and training.json."""
        with written_folder(folder) as aside:
            self.save_weights(aside)
            values: dict[str, Any] = asdict(self.quality)
            values["curve"] = curve_to_json(self.curve) if self.curve else None
            write_json(aside / "training.json", values)


def train_router(
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    params: MlpRouter | TfidfRouter,
    *,
    base: Path,
    seed: int,
    checkpoint: Checkpoint | None,
    title: str,
) -> TrainedRouter:
    """Train the kind of router that the params name; `title` stands on its progress bar."""
    if isinstance(params, MlpRouter):
        return _train_mlp(
            train, validation, params, base=base, seed=seed, checkpoint=checkpoint, title=title
        )
    texts, tasks = [row.text for row in train], [row.task for row in train]
    classifier = fit_tfidf(texts, tasks, regularisation=params.regularisation)
    num_parameters = classifier.coefficients.size + classifier.intercepts.size
    return TrainedRouter(
        classifier,
        lambda folder: classifier.save(folder, base=base),
        measure(classifier, validation, num_parameters),
        None,
    )


def _train_mlp(
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    params: MlpRouter,
    *,
    base: Path,
    seed: int,
    checkpoint: Checkpoint | None,
    title: str,
) -> TrainedRouter:
    tokenizer = read_tokenizer(base)
    labels = tuple(sorted({row.task for row in train}))
    rows, targets = _encode(train, labels, tokenizer, params.max_tokens)
    held_out, held_out_targets = _encode(validation, labels, tokenizer, params.max_tokens)
    torch.manual_seed(seed)
    model = _new_mlp(params, vocabulary=tokenizer.get_vocab_size(), num_labels=len(labels))

    def backward(_: int, drawn: Sequence[int]) -> float:
        logits = model(*bag([rows[row] for row in drawn]))
        loss = functional.cross_entropy(logits, targets[list(drawn)])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    @torch.no_grad()
    def validation_loss() -> float:
        return functional.cross_entropy(model(*bag(held_out)), held_out_targets).item()

    schedule = _schedule(params, num_rows=len(rows))
    with progress(title, total=schedule.steps) as advance:
        curve = fit(
            list(model.parameters()),
            backward,
            batch_order([1] * len(rows), params.batch_size, seed=seed),
            validation_loss=validation_loss,
            schedule=schedule,
            checkpoint=checkpoint,
            on_step=lambda point: advance(loss=point.loss),
            title=title,
        )
    classifier = MlpClassifier(model, tokenizer, labels, max_tokens=params.max_tokens)
    return TrainedRouter(
        classifier,
        lambda folder: classifier.save(folder, base=base),
        measure(classifier, validation, _num_parameters(model)),
        curve,
    )


def _new_mlp(params: MlpRouter, *, vocabulary: int, num_labels: int) -> MiniMlp:
    """Make a mini-MLP as wide as its budget of parameters allows."""
    width = embedding_width(
        budget=params.parameters,
        vocabulary=vocabulary,
        hidden=params.hidden,
        num_labels=num_labels,
    )
    model = MiniMlp(
        vocabulary=vocabulary, embedding=width, hidden=params.hidden, num_labels=num_labels
    )
    assert _num_parameters(model) <= params.parameters
    return model


def _num_parameters(model: MiniMlp) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _schedule(params: MlpRouter, *, num_rows: int) -> Schedule:
    """Validate once an epoch and warm up for one."""
    steps_per_epoch = max(1, num_rows // params.batch_size)
    steps = params.epochs * steps_per_epoch
    return Schedule(
        steps=steps,
        learning_rate=params.learning_rate,
        warmup_steps=min(steps_per_epoch, steps - 1),
        validate_every=steps_per_epoch,
        patience=params.patience,
    )


def _encode(
    labelled: Sequence[Labelled], labels: Sequence[str], tokenizer: Tokenizer, max_tokens: int
) -> tuple[list[list[int]], torch.Tensor]:
    rows = encode(tokenizer, [row.text for row in labelled], max_tokens=max_tokens)
    number: Mapping[str, int] = {label: place for place, label in enumerate(labels)}
    return rows, torch.tensor([number[row.task] for row in labelled])


def measure(
    classifier: Classifier, labelled: Sequence[Labelled], num_parameters: int
) -> RouterQuality:
    """Measure a classifier on labelled texts."""
    labels = classifier.labels
    probabilities = classifier.probabilities([row.text for row in labelled])
    truth = np.array([labels.index(row.task) for row in labelled])
    chosen = probabilities.argmax(1)
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(confusion, (truth, chosen), 1)
    return RouterQuality(
        labels=labels,
        accuracy=float((truth == chosen).mean()),
        calibration_error=calibration_error(probabilities.max(1), truth == chosen),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        num_parameters=num_parameters,
    )
