"""From the folder of a trained router to its classifier, and to what routes by it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from dlplora.errors import RouterError
from dlplora.params.systems import TopK, TopP
from dlplora.routing.build import load_classifier, router_of
from dlplora.routing.mlp import MiniMlp, MlpClassifier
from dlplora.routing.simple import fit_tfidf
from tests.tiny import write_tiny_tokenizer

TASKS = ["opposite", "colour"]
TEXTS = ["what is the opposite of up", "the opposite of hot", "which colour : one", "a colour"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_tokenizer(tmp_path / "base")


@pytest.fixture
def tfidf(tmp_path: Path, base: Path) -> Path:
    folder = tmp_path / "tfidf"
    folder.mkdir()
    labels = ["opposite", "opposite", "colour", "colour"]
    fit_tfidf(TEXTS, labels, regularisation=10.0).save(folder)
    return folder


@pytest.fixture
def mlp(tmp_path: Path, base: Path) -> Path:
    folder = tmp_path / "mlp"
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    torch.manual_seed(0)
    model = MiniMlp(vocabulary=tokenizer.get_vocab_size(), embedding=4, hidden=5, num_labels=2)
    labels = ("colour", "opposite")
    classifier = MlpClassifier(model, tokenizer, labels, max_tokens=8)
    classifier.save(folder, base=base)
    return folder


def top_k(k: int) -> TopK:
    return TopK(k=k, weights="renormalise")


@pytest.mark.parametrize("kind", ["tfidf", "mlp"])
def test_top_k_routes_by_the_classifier_of_its_folder(
    kind: str, base: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)

    classifier = load_classifier(folder, base=base, tasks=TASKS)
    routes = router_of(classifier, top_k(1)).route(TEXTS)

    likeliest = classifier.probabilities(TEXTS).argmax(1)
    assert [route.adapters for route in routes] == [
        (classifier.labels[place],) for place in likeliest
    ]


def test_top_p_keeps_both_tasks_when_it_must_reach_all(tfidf: Path, base: Path) -> None:
    classifier = load_classifier(tfidf, base=base, tasks=TASKS)
    routes = router_of(classifier, TopP(p=1.0, weights="renormalise")).route(TEXTS)

    assert [route.adapters[0] for route in routes] == ["opposite", "opposite", "colour", "colour"]
    assert all(set(route.adapters) == set(TASKS) for route in routes)


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        (["colour"], "trained for opposite, which the pool lacks; `dlplora"),
        (["colour", "opposite", "sum"], "not trained for sum; `dlplora"),
        (["colour", "contrary"], "not trained for contrary; trained for opposite, which the pool"),
    ],
)
@pytest.mark.parametrize("kind", ["tfidf", "mlp"])
def test_a_router_of_other_tasks_than_the_pool_is_refused(
    kind: str, tasks: list[str], told: str, base: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)

    with pytest.raises(RouterError) as caught:
        load_classifier(folder, base=base, tasks=tasks)

    assert str(caught.value).startswith(f"{folder}: {told}")


def test_the_order_of_the_tasks_of_the_pool_does_not_matter(tfidf: Path, base: Path) -> None:
    forward, backward = (
        router_of(load_classifier(tfidf, base=base, tasks=tasks), top_k(2))
        for tasks in (TASKS, TASKS[::-1])
    )

    assert forward.route(TEXTS) == backward.route(TEXTS)


def test_an_unknown_kind_is_refused_with_those_there_are(tfidf: Path, base: Path) -> None:
    card = json.loads((tfidf / "router.json").read_text(encoding="utf-8")) | {"kind": "oracle"}
    (tfidf / "router.json").write_text(json.dumps(card), encoding="utf-8")

    with pytest.raises(RouterError, match=r"'oracle'; there are: .*mlp.*, tfidf"):
        load_classifier(tfidf, base=base, tasks=TASKS)


def test_a_missing_folder_is_refused_by_its_name(tmp_path: Path, base: Path) -> None:
    with pytest.raises(RouterError, match="nowhere: no usable router"):
        load_classifier(tmp_path / "nowhere", base=base, tasks=TASKS)


@pytest.mark.parametrize("text", ["", "{", '{"labels": []}'])
def test_a_broken_card_is_refused(tfidf: Path, base: Path, text: str) -> None:
    (tfidf / "router.json").write_text(text, encoding="utf-8")

    with pytest.raises(RouterError, match="tfidf: no usable router"):
        load_classifier(tfidf, base=base, tasks=TASKS)


@pytest.mark.parametrize("change", [lambda weights: weights[:-9], lambda weights: weights + b"x"])
def test_weights_that_were_cut_or_changed_are_refused(
    tfidf: Path, base: Path, change: Callable[[bytes], bytes]
) -> None:
    file = tfidf / "router.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(RouterError, match=r"router\.safetensors: truncated or changed"):
        load_classifier(tfidf, base=base, tasks=TASKS)
