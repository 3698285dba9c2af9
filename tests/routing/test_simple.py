"""Routers that learn little, and TF-IDF against scikit-learn's own pipeline."""

import re
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline

from dlplora.data.scripts import terms_of
from dlplora.records.router_card import read_router_card
from dlplora.records.routes import Route
from dlplora.routing.simple import ConstantRouter, RandomRouter, TfidfClassifier, fit_tfidf

TEXTS = {
    "colour": ["Which colour is the sky?", "what colour: red, green or blue?", "Name a colour!"],
    "opposite": ["the opposite of up", "what is the opposite of hot (not cold)", "opposite: big"],
    "sum": ["what is 2 + 3?", "four plus five", "the sum of seven and 2"],
    "word": ["say the word a b c", "spell a word, please", "which word comes first?"],
}
UNSEEN = ["what colour is 2 + 2?", "the opposite word", "zebra", "", "Sum, sum! SUM of the words"]


def test_random_routes_do_not_depend_on_order_or_batch() -> None:
    router = RandomRouter(("a", "b", "c"), seed=3)
    texts = [f"question {number}" for number in range(30)]

    together = router.route(texts)

    assert together == [route for text in texts for route in router.route([text])]
    assert together == router.route(texts[::-1])[::-1]


def test_random_uses_every_label_about_equally_with_the_whole_weight() -> None:
    labels = ("a", "b", "c", "d")
    routes = RandomRouter(labels, seed=0).route([f"text {number}" for number in range(4000)])

    counts = Counter(route.adapters for route in routes)

    assert set(counts) == {(label,) for label in labels}
    deviation = (4000 * 1 / 4 * 3 / 4) ** 0.5
    assert all(abs(count - 1000) < 4 * deviation for count in counts.values())
    assert {route.weights for route in routes} == {(1.0,)}


def test_another_seed_draws_other_routes() -> None:
    texts = [f"text {number}" for number in range(50)]

    assert RandomRouter(("a", "b"), 0).route(texts) != RandomRouter(("a", "b"), 1).route(texts)


def test_a_constant_router_gives_every_text_its_route() -> None:
    route = Route(("a", "b"), (0.25, 0.75))

    assert ConstantRouter(route).route(["x", "y"]) == [route, route]
    assert ConstantRouter(route).route([]) == []


@pytest.mark.parametrize("tasks", [("opposite", "colour"), ("word", "sum", "colour", "opposite")])
@pytest.mark.parametrize("regularisation", [0.3, 10.0])
def test_tfidf_agrees_with_the_pipeline_of_scikit_learn(
    tasks: tuple[str, ...], regularisation: float
) -> None:
    texts, labels = _rows(tasks)
    vectoriser = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+|[^\w\s]"
    )
    regression = LogisticRegression(C=regularisation, max_iter=1000)
    pipeline = Pipeline([("features", vectoriser), ("regression", regression)]).fit(texts, labels)

    classifier = fit_tfidf(texts, labels, regularisation=regularisation)

    assert classifier.labels == tuple(sorted(tasks)) == tuple(pipeline.classes_)
    asked = [*texts, *UNSEEN]
    found = classifier.probabilities(asked)
    np.testing.assert_allclose(found, pipeline.predict_proba(asked), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1)


@pytest.mark.parametrize("tasks", [("opposite", "colour"), ("word", "sum", "colour", "opposite")])
def test_a_saved_tfidf_router_gives_the_same_probabilities(
    tmp_path: Path, tasks: tuple[str, ...]
) -> None:
    texts, labels = _rows(tasks)
    classifier = fit_tfidf(texts, labels, regularisation=10.0)
    classifier.save(tmp_path)

    loaded = TfidfClassifier.load(tmp_path, read_router_card(tmp_path))

    assert loaded.labels == classifier.labels
    expected = classifier.probabilities([*texts, *UNSEEN])
    np.testing.assert_array_equal(loaded.probabilities([*texts, *UNSEEN]), expected)
    np.testing.assert_array_equal(
        np.concatenate([loaded.probabilities([text]) for text in [*texts, *UNSEEN]]), expected
    )


def _rows(tasks: tuple[str, ...]) -> tuple[list[str], list[str]]:
    rows = [(text, task) for task in tasks for text in TEXTS[task]]
    return [text for text, _ in rows], [task for _, task in rows]


def test_texts_without_blanks_between_words_are_told_apart() -> None:
    weather = [f"今天{place}的天气怎么样" for place in ("上海", "北京", "广州", "成都")]
    food = [f"{place}有什么好吃的菜" for place in ("上海", "北京", "广州", "成都")]
    tasks = ["weather"] * 4 + ["food"] * 4
    router = fit_tfidf([*weather, *food], tasks, regularisation=10.0)
    found = router.probabilities(["明天重庆的天气怎么样", "重庆有什么好吃的面"]).argmax(1)
    assert [router.labels[row] for row in found] == ["weather", "food"]


@given(text=st.text(string.printable))
def test_terms_of_ascii_are_words_and_signs(text: str) -> None:
    assert terms_of(text) == re.findall(r"\w+|[^\w\s]", text)
