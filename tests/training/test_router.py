"""Routers trained on a small set of texts that words alone tell apart."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dlplora.data.balance import Labelled, RouterData
from dlplora.params.routing import EncoderRouter, MlpRouter, RouterParams, TfidfRouter
from dlplora.routing.base import Probabilities
from dlplora.routing.encoder import EncoderClassifier, load_encoder
from dlplora.routing.mlp import MlpClassifier
from dlplora.training.router import TrainedRouter, measure, num_steps, train_router
from dlplora.words import Advance
from tests.tiny import write_tiny_tokenizer
from tests.tiny_encoders import write_tiny_encoder

MLP = MlpRouter(
    kind="mlp",
    reads="data/base",
    parameters=4000,
    hidden=16,
    max_tokens=12,
    learning_rate=0.02,
    batch_size=16,
    epochs=8,
    patience=4,
)
TFIDF = TfidfRouter(kind="tfidf", reads="data/base", regularisation=10.0)
ENCODER = EncoderRouter(
    kind="encoder",
    reads="data/embedders/tiny",
    max_tokens=12,
    learning_rate=0.01,
    batch_size=16,
    epochs=8,
    patience=4,
)
WORDS = {
    "colour": ["red", "green", "blue", "grey"],
    "opposite": ["up", "down", "left", "right"],
    "sum": ["one", "two", "three", "four"],
}


def texts(count: int, *, seed: int) -> list[Labelled]:
    """Make texts of three words of their task among words that all tasks share."""
    rng = np.random.default_rng(seed)
    shared = ["what", "is", "the", "a", "?", "of"]
    return [
        Labelled(" ".join(rng.permutation([*rng.choice(shared, 2), *rng.choice(own, 3)])), task)
        for task, own in WORDS.items()
        for _ in range(count)
    ]


DATA = RouterData(train=texts(32, seed=1), validation=texts(10, seed=2))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reads(params: RouterParams, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a kind of router reads by."""
    if params.kind != "encoder":
        return base
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder"), "bert")


@pytest.fixture(scope="module", params=[MLP, TFIDF, ENCODER], ids=lambda params: params.kind)
def params(request: pytest.FixtureRequest) -> RouterParams:
    """The params of each kind of router in turn."""
    found: RouterParams = request.param
    return found


@pytest.fixture(scope="module")
def router(params: RouterParams, reads: Path) -> TrainedRouter:
    """A router of each kind, trained with seed 0."""
    return trained(params, reads, seed=0)


def trained(
    params: RouterParams, reads: Path, *, seed: int, advance: Advance = lambda **_: None
) -> TrainedRouter:
    return train_router(
        DATA.train,
        DATA.validation,
        params,
        no_task=["strange"],
        reads=reads,
        seed=seed,
        checkpoint=None,
        title="router",
        advance=advance,
    )


def test_separable_tasks_are_told_apart_on_held_out_texts(router: TrainedRouter) -> None:
    assert router.quality.accuracy == 1.0
    assert router.quality.labels == ("colour", "opposite", "sum")
    fresh = texts(10, seed=3)
    chosen = router.classifier.probabilities([row.text for row in fresh]).argmax(1)
    assert [router.classifier.labels[place] for place in chosen] == [row.task for row in fresh]


def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_before(
    params: RouterParams, router: TrainedRouter, reads: Path, tmp_path: Path
) -> None:
    router.save(tmp_path / "first")
    torch.rand(3)
    trained(params, reads, seed=0).save(tmp_path / "second")

    same_files(tmp_path / "first", tmp_path / "second")


def same_files(first: Path, second: Path) -> None:
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert {"router.safetensors", "router.json", "training.json"} <= set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_an_encoder_begins_with_its_pretrained_weights_and_learns_from_there(
    tmp_path: Path,
) -> None:
    folder = write_tiny_encoder(tmp_path / "encoder", "roberta")
    still = ENCODER.model_copy(update={"learning_rate": 1e-30, "epochs": 1})
    moved = ENCODER.model_copy(update={"epochs": 1})
    states = []
    for params in (still, moved):
        classifier = trained(params, folder, seed=0).classifier
        assert isinstance(classifier, EncoderClassifier)
        states.append(classifier.model.encoder.state_dict())
    pretrained = load_encoder(folder, max_tokens=12).state_dict()
    assert set(states[0]) == set(pretrained)
    for name, tensor in pretrained.items():
        assert torch.equal(states[0][name], tensor), name
    changed = {
        name for name, tensor in pretrained.items() if not torch.equal(states[1][name], tensor)
    }
    assert "embeddings.word_embeddings.weight" in changed
    assert "encoder.layer.0.attention.self.query.weight" in changed


def test_another_seed_gives_another_mlp(base: Path) -> None:
    state = torch.random.get_rng_state()
    first = trained(MLP, base, seed=0)
    torch.random.set_rng_state(state)
    second = trained(MLP, base, seed=1)

    texts = [row.text for row in DATA.validation]
    probabilities = [each.classifier.probabilities(texts) for each in (first, second)]
    assert not np.array_equal(*probabilities)


def test_training_json_holds_the_quality_and_the_curve(
    params: RouterParams, router: TrainedRouter, tmp_path: Path
) -> None:
    router.save(tmp_path / "router")

    values = json.loads((tmp_path / "router" / "training.json").read_text(encoding="utf-8"))
    assert values["accuracy"] == router.quality.accuracy
    assert values["calibration_error"] == router.quality.calibration_error
    assert values["labels"] == ["colour", "opposite", "sum"]
    assert values["confusion"] == [[10, 0, 0], [0, 10, 0], [0, 0, 10]]
    assert values["num_parameters"] == router.quality.num_parameters
    if params.kind == "tfidf":
        assert values["curve"] is None
        return
    points = values["curve"]["points"]
    best = min(
        (point for point in points if point["validation_loss"] is not None),
        key=lambda point: point["validation_loss"],
    )
    assert values["curve"]["best_step"] == best["step"] > 0
    assert [point["step"] for point in points] == list(range(len(points)))


def test_a_training_reports_each_of_its_steps(params: RouterParams, reads: Path) -> None:
    if not isinstance(params, TfidfRouter):
        params = params.model_copy(update={"patience": params.epochs})
    losses: list[float] = []
    curve = trained(params, reads, seed=0, advance=lambda *, loss: losses.append(loss)).curve
    assert len(losses) == num_steps(params, num_rows=len(DATA.train))
    assert losses == ([point.loss for point in curve.points[1:]] if curve else [])


def test_a_router_counts_its_parameters_and_the_mlp_keeps_its_budget(
    router: TrainedRouter, tmp_path: Path
) -> None:
    if isinstance(router.classifier, MlpClassifier):
        sizes = [parameter.numel() for parameter in router.classifier.model.parameters()]
        assert sum(sizes) <= MLP.parameters
    elif isinstance(router.classifier, EncoderClassifier):
        sizes = [parameter.numel() for parameter in router.classifier.model.parameters()]
    else:
        router.save(tmp_path / "router")
        tensors = load_file(tmp_path / "router" / "router.safetensors")
        sizes = [tensors["coefficients"].size, tensors["intercepts"].size]

    assert sum(sizes) == router.quality.num_parameters


def test_saving_replaces_the_folder_and_leaves_its_own_files(
    params: RouterParams, router: TrainedRouter, tmp_path: Path
) -> None:
    folder = tmp_path / "router"
    folder.mkdir()
    (folder / "old.txt").write_text("", encoding="utf-8")

    router.save(folder)

    files = sorted(path.name for path in folder.iterdir())
    own = ["config.json", "tokenizer.json"] if params.kind == "encoder" else []
    assert files == sorted([*own, "router.json", "router.safetensors", "training.json"])
    assert not list(tmp_path.glob(".router*"))


class Told:
    """A classifier that gives the probabilities it was told, by text."""

    labels = ("a", "b", "c")
    table = {  # noqa: RUF012 – read only
        "w": [0.4, 0.3, 0.3],
        "x": [0.8, 0.1, 0.1],
        "y": [0.2, 0.5, 0.3],
        "z": [0.0, 0.0, 1.0],
    }

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        return np.array([self.table[text] for text in texts])


def test_the_confusion_matrix_counts_texts_by_true_task_and_first_choice() -> None:
    asked = [("x", "a"), ("x", "a"), ("y", "a"), ("y", "b"), ("z", "b"), ("z", "c"), ("x", "c")]

    quality = measure(Told(), [Labelled(text, task) for text, task in asked], 7, no_task=["w"])

    assert quality.confusion == ((2, 1, 0), (0, 1, 1), (1, 0, 1))
    assert sum(map(sum, quality.confusion)) == len(asked)
    assert quality.accuracy == pytest.approx(4 / 7)
    gaps = [3 * abs(2 / 3 - 0.8), 2 * abs(1 / 2 - 0.5), 2 * abs(1 / 2 - 1.0)]
    assert quality.calibration_error == pytest.approx(sum(gaps) / 7)
    assert quality.num_parameters == 7
    assert 0.4 < quality.fallback_below < 0.5
