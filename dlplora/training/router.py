"""Routers trained on router data, each with how well it does on held-out questions."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dlplora.data.balance import Labelled
from dlplora.data.batches import batch_order
from dlplora.params.routing import (
    EncoderRouter,
    EnsembleRouter,
    LinearRouter,
    MlpRouter,
    RouterParams,
    TfidfRouter,
)
from dlplora.records.files import write_json, written_folder
from dlplora.records.router_card import write_fallback
from dlplora.records.training import Curve, curve_to_json
from dlplora.routing.base import Classifier, calibration_error, fallback_threshold
from dlplora.routing.embedding import Embedder
from dlplora.routing.encoder import EncoderClassifier, EncoderNetwork, load_encoder, load_tokenizer
from dlplora.routing.ensemble import EnsembleClassifier
from dlplora.routing.linear import LinearClassifier, fit_linear
from dlplora.routing.mlp import MiniMlp, MlpClassifier, embedding_width, read_tokenizer
from dlplora.routing.simple import TfidfClassifier, fit_tfidf
from dlplora.runtime import best_place
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.loop import Schedule, fit
from dlplora.words import Advance


@dataclass(frozen=True)
class RouterQuality:
    """A router on the validation texts.

    `calibration_error` is the expected one over 15 equal bins of confidence; `confusion` counts
    texts by true task (rows) and first choice (columns), in the order of `labels`. Routes of less
    confidence than `fallback_below` had better go to the base model.
    """

    labels: tuple[str, ...]
    accuracy: float
    calibration_error: float
    confusion: tuple[tuple[int, ...], ...]
    num_parameters: int
    fallback_below: float


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
            write_fallback(aside, self.quality.fallback_below)
            values: dict[str, Any] = asdict(self.quality)
            values["curve"] = curve_to_json(self.curve) if self.curve else None
            write_json(aside / "training.json", values)


def train_router(
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    params: RouterParams,
    *,
    no_task: Sequence[str],
    reads: Path,
    seed: int,
    checkpoint: Checkpoint | None,
    title: str,
    advance: Advance,
) -> TrainedRouter:
    """Train the kind of router that the params name; `title` names the training in messages.

    Some kinds are calibrated on the validation texts and on texts of `no_task`, which also say
    from which confidence on each is to be believed. `reads` is the folder whose tokenizer, encoder
    or embedder it reads by. `advance` is called after each of at most `num_steps`.
    """
    if not isinstance(params, MlpRouter | EncoderRouter):
        fitted = _fit(params, train, reads)
        if not isinstance(fitted, TfidfClassifier):
            tasks = [row.task for row in validation]
            texts = [row.text for row in validation]
            fitted = fitted.calibrated(texts, tasks, strange=no_task)
        quality = measure(fitted, validation, fitted.num_parameters, no_task=no_task)
        return TrainedRouter(fitted, fitted.save, quality, None)
    labels = tuple(sorted({row.task for row in train}))
    classifier: MlpClassifier | EncoderClassifier
    save: Callable[[Path], None]
    if isinstance(params, MlpRouter):
        classifier = mlp = _new_mlp(params, labels, base=reads, seed=seed)
        save = partial(mlp.save, base=reads)
    else:
        classifier = _new_encoder(params, labels, folder=reads, seed=seed)
        save = classifier.save
    fitting = partial(
        fit,
        schedule=_schedule(params, num_rows=len(train)),
        checkpoint=checkpoint,
        on_step=lambda point: advance(loss=point.loss),
        title=title,
    )
    curve = _optimise(classifier, train, validation, params.batch_size, seed, fitting)
    num_parameters = sum(parameter.numel() for parameter in classifier.model.parameters())
    quality = measure(classifier, validation, num_parameters, no_task=no_task)
    return TrainedRouter(classifier, save, quality, curve)


def _fit(
    params: TfidfRouter | LinearRouter | EnsembleRouter, train: Sequence[Labelled], reads: Path
) -> TfidfClassifier | LinearClassifier | EnsembleClassifier:
    """Fit a router that needs no gradients."""
    texts, tasks = [row.text for row in train], [row.task for row in train]
    if isinstance(params, TfidfRouter):
        return fit_tfidf(texts, tasks, regularisation=params.regularisation)
    embedder = Embedder.load(reads, device=best_place().device)
    vectors_MD = embedder.embed(texts, normalise=True)
    fit_vectors = partial(fit_linear, embedder=embedder, vectors_MD=vectors_MD, tasks=tasks)
    if isinstance(params, LinearRouter):
        return fit_vectors(params.kind, regularisation=params.regularisation)
    return EnsembleClassifier(
        fit_tfidf(texts, tasks, regularisation=params.words_regularisation),
        fit_vectors("logistic", regularisation=params.meaning_regularisation),
    )


def _new_mlp(params: MlpRouter, labels: tuple[str, ...], *, base: Path, seed: int) -> MlpClassifier:
    """Draw a mini-MLP as wide as its budget of parameters allows."""
    tokenizer = read_tokenizer(base)
    shape = {
        "vocabulary": tokenizer.get_vocab_size(),
        "hidden": params.hidden,
        "num_labels": len(labels),
    }
    torch.manual_seed(seed)
    model = MiniMlp(embedding=embedding_width(budget=params.parameters, **shape), **shape)
    return MlpClassifier(model, tokenizer, labels, params.max_tokens)


def _new_encoder(
    params: EncoderRouter, labels: tuple[str, ...], *, folder: Path, seed: int
) -> EncoderClassifier:
    """Load a pretrained encoder and draw what classifies upon it."""
    tokenizer = load_tokenizer(folder)
    encoder = load_encoder(folder, max_tokens=params.max_tokens)
    torch.manual_seed(seed)
    model = EncoderNetwork(encoder, len(labels)).to(best_place().device)
    return EncoderClassifier(model, tokenizer, labels, params.max_tokens)


def _optimise(
    classifier: MlpClassifier | EncoderClassifier,
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    batch_size: int,
    seed: int,
    fitting: Callable[..., Curve],
) -> Curve:
    """Minimise the cross-entropy of a network on labelled texts; it keeps its best weights."""
    model = classifier.model
    device = next(model.parameters()).device

    def loss_of(part: Sequence[tuple[list[int], int]], reduction: str = "mean") -> Tensor:
        rows, targets = zip(*part, strict=True)
        targets_B = torch.tensor(targets, device=device)
        return functional.cross_entropy(classifier.logits(rows), targets_B, reduction=reduction)

    def backward(_: int, drawn: Sequence[int]) -> float:
        model.train()
        loss = loss_of([learned[row] for row in drawn])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    @torch.no_grad()
    def validation_loss() -> float:
        model.eval()
        starts = range(0, len(held_out), batch_size)
        parts = [held_out[start : start + batch_size] for start in starts]
        return sum(loss_of(part, "sum").item() for part in parts) / len(held_out)

    learned, held_out = (_encoded(classifier, part) for part in (train, validation))
    held_out.sort(key=lambda pair: len(pair[0]))
    is_padded = isinstance(classifier, EncoderClassifier)  # a bag is not
    lengths = [len(row) if is_padded else 1 for row, _ in learned]
    batches = batch_order(lengths, batch_size, seed=seed)
    curve = fitting(list(model.parameters()), backward, batches, validation_loss=validation_loss)
    model.eval()
    return curve


def _encoded(
    classifier: MlpClassifier | EncoderClassifier, labelled: Sequence[Labelled]
) -> list[tuple[list[int], int]]:
    """Return the tokens of each text with the place of its task among the labels."""
    rows = classifier.encode([row.text for row in labelled])
    places = [classifier.labels.index(row.task) for row in labelled]
    return list(zip(rows, places, strict=True))


def num_steps(params: RouterParams, *, num_rows: int) -> int:
    """Return how many steps the training of a router on so many texts takes at most."""
    if not isinstance(params, MlpRouter | EncoderRouter):
        return 0
    return params.epochs * max(1, num_rows // params.batch_size)


def _schedule(params: MlpRouter | EncoderRouter, *, num_rows: int) -> Schedule:
    """Validate once an epoch and warm up for one."""
    steps = num_steps(params, num_rows=num_rows)
    steps_per_epoch = steps // params.epochs
    return Schedule(
        steps=steps,
        learning_rate=params.learning_rate,
        warmup_steps=min(steps_per_epoch, steps - 1),
        validate_every=steps_per_epoch,
        patience=params.patience,
    )


def measure(
    classifier: Classifier,
    labelled: Sequence[Labelled],
    num_parameters: int,
    *,
    no_task: Sequence[str],
) -> RouterQuality:
    """Measure a classifier on labelled texts and on texts of no task."""
    labels = classifier.labels
    probabilities = classifier.probabilities([row.text for row in labelled])
    truth = np.array([labels.index(row.task) for row in labelled])
    chosen, confidence = probabilities.argmax(1), probabilities.max(1)
    confusion = np.zeros((len(labels), len(labels)), dtype=int)
    np.add.at(confusion, (truth, chosen), 1)
    return RouterQuality(
        labels=labels,
        accuracy=float((truth == chosen).mean()),
        calibration_error=calibration_error(confidence, truth == chosen),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        num_parameters=num_parameters,
        fallback_below=fallback_threshold(
            confidence, truth == chosen, classifier.probabilities(no_task).max(1)
        ),
    )
