"""Routers trained on router data, each with how well it does on held-out questions."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dlplora.data.balance import Labelled
from dlplora.data.batches import batch_order
from dlplora.params.routing import EncoderRouter, MlpRouter, RouterParams, TfidfRouter
from dlplora.records.files import write_json, written_folder
from dlplora.records.training import Curve, curve_to_json
from dlplora.routing.base import Classifier, calibration_error
from dlplora.routing.encoder import EncoderClassifier, EncoderNetwork, load_encoder, load_tokenizer
from dlplora.routing.encoder import encode as encode_for_encoder
from dlplora.routing.mlp import MiniMlp, MlpClassifier, bag, embedding_width, encode, read_tokenizer
from dlplora.routing.simple import fit_tfidf
from dlplora.runtime import best_place
from dlplora.training.checkpoint import Checkpoint
from dlplora.training.loop import Schedule, fit
from dlplora.words import Advance


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
    params: RouterParams,
    *,
    reads: Path,
    seed: int,
    checkpoint: Checkpoint | None,
    title: str,
    advance: Advance,
) -> TrainedRouter:
    """Train the kind of router that the params name; `title` names the training in messages.

    `reads` is the folder whose tokenizer, or encoder, it reads by. `advance` is called after each
    of at most `num_steps`.
    """
    if isinstance(params, TfidfRouter):
        return _train_tfidf(train, validation, params, base=reads)
    texts = _Texts(train, validation)
    course = _Course(params, seed, checkpoint, title, advance)
    if isinstance(params, MlpRouter):
        return _train_mlp(texts, params, course, base=reads)
    return _train_encoder(texts, params, course, folder=reads)


@dataclass(frozen=True)
class _Texts:
    """The texts to learn from and those to judge by."""

    train: Sequence[Labelled]
    validation: Sequence[Labelled]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(sorted({row.task for row in self.train}))


@dataclass(frozen=True)
class _Course:
    """How a network is optimised."""

    params: MlpRouter | EncoderRouter
    seed: int
    checkpoint: Checkpoint | None
    title: str
    advance: Advance


def _train_tfidf(
    train: Sequence[Labelled], validation: Sequence[Labelled], params: TfidfRouter, *, base: Path
) -> TrainedRouter:
    texts, tasks = [row.text for row in train], [row.task for row in train]
    classifier = fit_tfidf(texts, tasks, regularisation=params.regularisation)
    num_parameters = classifier.coefficients.size + classifier.intercepts.size
    return TrainedRouter(
        classifier,
        lambda folder: classifier.save(folder, base=base),
        measure(classifier, validation, num_parameters),
        None,
    )


def _train_mlp(texts: _Texts, params: MlpRouter, course: _Course, *, base: Path) -> TrainedRouter:
    tokenizer, labels = read_tokenizer(base), texts.labels
    torch.manual_seed(course.seed)
    model = _new_mlp(params, vocabulary=tokenizer.get_vocab_size(), num_labels=len(labels))
    curve = _optimise(
        model,
        lambda rows: model(*bag(rows)),
        lambda asked: encode(tokenizer, asked, max_tokens=params.max_tokens),
        texts,
        course,
        by_length=False,  # a bag is not padded
    )
    classifier = MlpClassifier(model, tokenizer, labels, max_tokens=params.max_tokens)
    quality = measure(classifier, texts.validation, _num_parameters(model))
    return TrainedRouter(
        classifier, lambda folder: classifier.save(folder, base=base), quality, curve
    )


def _train_encoder(
    texts: _Texts, params: EncoderRouter, course: _Course, *, folder: Path
) -> TrainedRouter:
    tokenizer, labels = load_tokenizer(folder), texts.labels
    encoder = load_encoder(folder, max_tokens=params.max_tokens)
    torch.manual_seed(course.seed)
    model = EncoderNetwork(encoder, len(labels)).to(best_place().device)
    curve = _optimise(
        model,
        model,
        lambda asked: encode_for_encoder(tokenizer, asked, max_tokens=params.max_tokens),
        texts,
        course,
        by_length=True,
    )
    classifier = EncoderClassifier(model, tokenizer, labels, max_tokens=params.max_tokens)
    quality = measure(classifier, texts.validation, _num_parameters(model))
    return TrainedRouter(classifier, classifier.save, quality, curve)


def _optimise(
    model: nn.Module,
    logits_of: Callable[[Sequence[list[int]]], Tensor],
    encoded: Callable[[Sequence[str]], list[list[int]]],
    texts: _Texts,
    course: _Course,
    *,
    by_length: bool,
) -> Curve:
    """Minimise the cross-entropy of a network on encoded texts; it keeps its best weights."""
    device = next(model.parameters()).device
    number = {label: place for place, label in enumerate(texts.labels)}
    rows, held_out = (
        encoded([row.text for row in part]) for part in (texts.train, texts.validation)
    )
    targets, held_out_targets = (
        torch.tensor([number[row.task] for row in part], device=device)
        for part in (texts.train, texts.validation)
    )
    size = course.params.batch_size

    def backward(_: int, drawn: Sequence[int]) -> float:
        model.train()
        loss = functional.cross_entropy(logits_of([rows[row] for row in drawn]), targets[drawn])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    @torch.no_grad()
    def validation_loss() -> float:
        model.eval()
        order = sorted(range(len(held_out)), key=lambda row: len(held_out[row]))
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        losses = [
            functional.cross_entropy(
                logits_of([held_out[row] for row in part]), held_out_targets[part], reduction="sum"
            ).item()
            for part in parts
        ]
        return sum(losses) / len(order)

    schedule = _schedule(course.params, num_rows=len(rows))
    lengths = [len(row) if by_length else 1 for row in rows]
    return fit(
        list(model.parameters()),
        backward,
        batch_order(lengths, size, seed=course.seed),
        validation_loss=validation_loss,
        schedule=schedule,
        checkpoint=course.checkpoint,
        on_step=lambda point: course.advance(loss=point.loss),
        title=course.title,
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


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def num_steps(params: RouterParams, *, num_rows: int) -> int:
    """Return how many steps the training of a router on so many texts takes at most."""
    if isinstance(params, TfidfRouter):
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
