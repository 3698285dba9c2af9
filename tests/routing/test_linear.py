"""Linear routers and ensembles beside scikit-learn, closed forms and plain products."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from dlplora.routing.embedding import unit
from dlplora.routing.ensemble import EnsembleClassifier
from dlplora.routing.linear import fit_linear
from dlplora.routing.simple import fit_tfidf
from tests.embedders import TASKS_OF_TEXTS, ToldEmbedder, check_saved_router, tiny_embedder
from tests.embedders import TEXTS as SAID

RNG = np.random.default_rng(0)
TASKS = [str(task) for task in RNG.choice(["a", "b", "c"], 90)]
VECTORS = unit(
    np.array([(ord(task) - 98, 1, 0.5 * (task == "b")) for task in TASKS])
    + 0.5 * RNG.normal(size=(90, 3))
).astype(np.float32)
TEXTS = [f"text {number}" for number in range(90)]
TOLD = ToldEmbedder({text: row.tolist() for text, row in zip(TEXTS, VECTORS, strict=True)})
KINDS: tuple[Literal["logistic", "ridge"], ...] = ("logistic", "ridge")


@pytest.mark.parametrize("tasks", [TASKS, ["b" if task == "a" else task for task in TASKS]])
def test_logistic_probabilities_are_scikit_learns(tasks: list[str]) -> None:
    found = fit_linear("logistic", TOLD, VECTORS, tasks, regularisation=3.0)
    reference = LogisticRegression(C=3.0, max_iter=1000).fit(VECTORS.astype(np.float64), tasks)
    assert found.labels == tuple(reference.classes_)
    expected = reference.predict_proba(VECTORS.astype(np.float64))
    np.testing.assert_allclose(found.probabilities(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("names", ["abc", "bc"])
def test_ridge_solves_the_normal_equations_with_all_tasks_alike(names: str) -> None:
    tasks = [task if task in names else "b" for task in TASKS]
    found = fit_linear("ridge", TOLD, VECTORS, tasks, regularisation=0.5)
    weights = np.array([len(tasks) / (len(names) * tasks.count(task)) for task in tasks])
    targets = np.array([[2.0 * (task == name) - 1 for name in names] for task in tasks])
    centre, mean = (np.average(part, axis=0, weights=weights) for part in (VECTORS, targets))
    x, y = VECTORS - centre, targets - mean
    solved = np.linalg.solve(
        x.T @ (weights[:, None] * x) + 0.5 * np.eye(3), x.T @ (weights[:, None] * y)
    )
    scores = x @ solved + mean
    if len(names) == 2:  # scikit-learn solves for one of the two
        scores = scores / 2
    np.testing.assert_allclose(found.probabilities(TEXTS), softmax(scores, 1), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_keeps_choices_and_is_the_likeliest_temperature(kind: str) -> None:
    plain = fit_linear(kind, TOLD, VECTORS, TASKS, regularisation=1.0)  # type: ignore[arg-type]
    found = plain.calibrated(TEXTS, TASKS, strange=TEXTS[:5])
    places = np.arange(len(TASKS)), [found.labels.index(task) for task in TASKS]

    def loss(temperature: float) -> float:
        logits = np.log(plain.probabilities(TEXTS)) / temperature
        likely = log_softmax(logits, 1)
        return -float(0.97 * likely[places].mean() + 0.03 * likely[:5].mean())

    grid = np.exp(np.linspace(-6, 3, 300))
    assert loss(found.temperature) <= min(map(loss, grid)) + 1e-5
    chosen = plain.probabilities(TEXTS).argmax(1)
    assert np.array_equal(found.probabilities(TEXTS).argmax(1), chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_one_task_is_always_chosen(kind: str) -> None:
    found = fit_linear(kind, TOLD, VECTORS, ["a"] * 90, regularisation=1.0)  # type: ignore[arg-type]
    assert found.labels == ("a",)
    calibrated = found.calibrated(TEXTS, ["a"] * 90, strange=TEXTS[:5])
    assert np.array_equal(calibrated.probabilities(TEXTS), np.ones((90, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_router_is_whole(kind: str, tmp_path: Path) -> None:
    embedder, vectors = tiny_embedder(tmp_path / "embedder")
    made = fit_linear(kind, embedder, vectors, TASKS_OF_TEXTS, regularisation=1.0)  # type: ignore[arg-type]
    made = made.calibrated(
        ["say green", "what is up left ?"], ["colours", "opposites"], strange=["one plus"]
    )
    check_saved_router(made, tmp_path)


def test_an_ensemble_is_the_normalised_geometric_mean(tmp_path: Path) -> None:
    embedder, vectors = tiny_embedder(tmp_path / "embedder")
    words = fit_tfidf(SAID, TASKS_OF_TEXTS, regularisation=10.0)
    meaning = fit_linear("logistic", embedder, vectors, TASKS_OF_TEXTS, regularisation=10.0)
    asked = [*SAID, "say up", "one plus two"]

    made = EnsembleClassifier(words, meaning)

    product = np.sqrt(words.probabilities(asked) * meaning.probabilities(asked))
    expected = product / product.sum(1, keepdims=True)
    np.testing.assert_allclose(made.probabilities(asked), expected, rtol=1e-9)
    calibrated = made.calibrated(
        ["say green", "say left ?"], ["colours", "opposites"], strange=["one plus"]
    )
    warmer = expected ** (1 / calibrated.temperature)
    np.testing.assert_allclose(
        calibrated.probabilities(asked), warmer / warmer.sum(1, keepdims=True), rtol=1e-6
    )
    loaded = check_saved_router(calibrated, tmp_path)
    assert np.array_equal(loaded.probabilities(asked), calibrated.probabilities(asked))
    assert np.array_equal(loaded.vectors(asked), embedder.embed(asked, normalise=True))


def test_texts_of_no_task_keep_a_router_that_is_always_right_from_being_sure_of_them() -> None:
    vectors = np.array([[1, 0, 0], [0, 1, 0]] * 20, dtype=np.float32)
    names, tasks = [f"{number}" for number in range(40)], ["a", "b"] * 20
    rows = dict(zip(names, vectors.tolist(), strict=True)) | {"strange": [0.8, 0.6, 0]}
    told = ToldEmbedder(rows)
    plain = fit_linear("logistic", told, vectors, tasks, regularisation=1.0)
    found = plain.calibrated(names, tasks, strange=["strange"])
    assert found.probabilities(names).max(1).min() > 0.9
    assert found.probabilities(["strange"]).max() < found.probabilities(names).max(1).min()
    assert found.probabilities(["strange"]).max() < 0.9
