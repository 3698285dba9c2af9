"""Retrieval on vectors of two dimensions, and on a tiny embedder."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from dlplora.errors import RouterError
from dlplora.params.routing import Index
from dlplora.params.systems import TopK, TopP
from dlplora.routing.base import Router
from dlplora.routing.build import load_classifier, router_of
from dlplora.routing.embedding import Embedder
from dlplora.routing.retriever import (
    RetrievalRouter,
    Retriever,
    embed_adapter,
    read_indexes,
    write_index,
)
from tests.device import device
from tests.embedders import ToldEmbedder, write_tiny_embedder
from tests.tiny import write_tiny_tokenizer

DEVICE = device()
ASK = "find: "
EAST, NORTH_EAST, NORTH, FAR_NORTH, WEST = (1, 0), (2, 2), (0, 1), (0, 9), (-1, 0)
VECTORS = {
    f"{ASK}{name}": vector
    for name, vector in {"e": EAST, "ne": NORTH_EAST, "n": NORTH, "nn": FAR_NORTH}.items()
}
MEANS = np.array([EAST, NORTH_EAST, FAR_NORTH, WEST], dtype=np.float32)
TASKS = ("a", "b", "c", "d")


def retriever(similarity: Literal["cosine", "inner_product"]) -> Retriever:
    return Retriever(ToldEmbedder(VECTORS), TASKS, MEANS, ASK, similarity, temperature=0.5)


def nearest(k: int, similarity: Literal["cosine", "inner_product"] = "cosine") -> RetrievalRouter:
    selection = TopK(k=k, weights="equal")
    return RetrievalRouter(retriever(similarity), selection)


def test_cosine_by_hand() -> None:
    half = np.sqrt(0.5)
    np.testing.assert_allclose(
        retriever("cosine").similarities(["e", "ne", "n"]),
        [[1, half, 0, -1], [half, 1, half, -half], [0, half, 1, 0]],
        atol=1e-6,
    )


def test_the_inner_product_by_hand_scales_neither_text_nor_mean() -> None:
    np.testing.assert_allclose(
        retriever("inner_product").similarities(["e", "ne", "nn"]),
        [[1, 2, 0, -1], [2, 8, 18, -2], [0, 18, 81, 0]],
    )


def test_probabilities_are_a_softmax_over_the_temperature() -> None:
    found = retriever("inner_product").probabilities(["e"])[0]

    exponentials = np.exp(np.array([1, 2, 0, -1]) / 0.5)
    np.testing.assert_allclose(found, exponentials / exponentials.sum())


@pytest.mark.parametrize("k", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("text", ["e", "ne", "n", "nn"])
def test_the_k_kept_are_the_set_of_the_largest_sum_with_equal_weights(k: int, text: str) -> None:
    (scores,) = retriever("cosine").similarities([text])
    by_task = dict(zip(TASKS, scores, strict=True))

    (route,) = nearest(k).route([text])

    size = min(k, len(TASKS))
    sums = {chosen: sum(map(by_task.get, chosen)) for chosen in combinations(TASKS, size)}
    assert sum(map(by_task.get, route.adapters)) == pytest.approx(max(sums.values()))
    assert len(route.adapters) == size
    assert route.weights == pytest.approx((1 / size,) * size)
    assert by_task[route.adapters[0]] == max(scores)
    assert route.confidence == retriever("cosine").probabilities([text]).max()


def test_an_inner_product_may_choose_otherwise_than_the_cosine() -> None:
    assert nearest(1).route(["ne"])[0].adapters == ("b",)
    assert nearest(1, "inner_product").route(["ne"])[0].adapters == ("c",)


def test_neither_the_order_of_adapters_nor_that_of_texts_matters() -> None:
    plain = nearest(3).route(["e", "ne", "n"])
    order = [2, 0, 3, 1]
    shuffled = replace(
        retriever("cosine"), labels=tuple(TASKS[n] for n in order), means_ND=MEANS[order]
    )
    turned = RetrievalRouter(shuffled, nearest(3).selection).route(["n", "ne", "e"])

    for one, other in zip(plain, turned[::-1], strict=True):
        ties = len(set(one.adapters) ^ set(other.adapters))
        assert ties in (0, 2)  # two adapters are equally far from "n"
        assert one.adapters[0] == other.adapters[0]
        assert one.confidence == other.confidence
    assert nearest(2).route(["e", "ne"])[::-1] == nearest(2).route(["ne", "e"])


def test_a_new_adapter_changes_no_other_similarity() -> None:
    more = replace(
        retriever("cosine"),
        labels=(*TASKS, "e"),
        means_ND=np.vstack([MEANS, [[3, 1]]]).astype(np.float32),
    )

    texts = ["e", "ne", "n"]
    assert np.array_equal(more.similarities(texts)[:, :4], retriever("cosine").similarities(texts))


def test_top_p_keeps_by_probability_and_is_as_sure_of_the_first() -> None:
    selection = TopP(p=0.6, weights="renormalise")
    (route,) = RetrievalRouter(retriever("cosine"), selection).route(["e"])

    probabilities = retriever("cosine").probabilities(["e"])[0]
    assert probabilities[0] < 0.6 <= probabilities[0] + probabilities[1]
    assert route.adapters == ("a", "b")
    assert route.weights == pytest.approx(probabilities[:2] / probabilities[:2].sum())
    assert route.confidence == probabilities[0]


def test_probabilities_that_round_to_a_tie_leave_the_order_of_similarities() -> None:
    sharp = replace(retriever("cosine"), temperature=1e-4)
    (route,) = RetrievalRouter(sharp, nearest(4).selection).route(["e"])

    assert np.count_nonzero(sharp.probabilities(["e"])) == 1
    assert route.adapters == nearest(4).route(["e"])[0].adapters


def test_an_adapter_is_the_mean_of_inputs_drawn_by_the_seed_not_scaled() -> None:
    questions = [str(number) for number in range(50)]
    told = ToldEmbedder({f"{ASK}{text}": (int(text), 1) for text in questions})
    index = Index(inputs=20, instruction=ASK)

    found = embed_adapter(told, questions, index=index, seed=0)

    rows = np.random.default_rng(0).permutation(50)[:20]
    np.testing.assert_allclose(found, [rows.mean(), 1], rtol=1e-6)
    assert np.array_equal(found, embed_adapter(told, questions, index=index, seed=0))
    assert not np.array_equal(found, embed_adapter(told, questions, index=index, seed=1))


def test_fewer_inputs_than_asked_for_are_all_taken() -> None:
    told = ToldEmbedder({text: (float(text), 1) for text in ("1", "2", "6")})
    index = Index(inputs=20, instruction="")

    found = embed_adapter(told, ["1", "2", "6"], index=index, seed=0)

    np.testing.assert_allclose(found, [3, 1])


def test_indexes_read_back_by_task_and_embedder(tmp_path: Path) -> None:
    for place, task in enumerate(TASKS):
        write_index(tmp_path / f"{task}.safetensors", {"one": MEANS[place], "two": -MEANS[place]})

    assert np.array_equal(read_indexes(tmp_path, TASKS, embedder="one"), MEANS)
    assert np.array_equal(read_indexes(tmp_path, ("c", "a"), embedder="two"), -MEANS[[2, 0]])
    with pytest.raises(
        RouterError, match=r"a\.safetensors: not by the embedder three; by one, two"
    ):
        read_indexes(tmp_path, TASKS, embedder="three")
    with pytest.raises(RouterError, match=r"x\.safetensors: no usable index"):
        read_indexes(tmp_path, ["x"], embedder="one")


def test_a_saved_retriever_is_whole_and_routes_as_before(tmp_path: Path) -> None:
    write_tiny_embedder(tmp_path / "embedder")
    base = write_tiny_tokenizer(tmp_path / "base")
    embedder = Embedder.load(tmp_path / "embedder", device=DEVICE)
    texts = ["say red", "what is up ?", "one plus two"]
    made = Retriever(
        embedder,
        ("colours", "opposites", "sums"),
        embedder.embed(texts, instruction=ASK, normalise=False),
        ASK,
        "cosine",
        temperature=0.1,
    )
    (tmp_path / "router").mkdir()
    made.save(tmp_path / "router")
    (tmp_path / "embedder").rename(tmp_path / "gone")

    classifier = load_classifier(tmp_path / "router", base=base, tasks=made.labels)

    router: Router = router_of(classifier, TopK(k=2, weights="equal"))
    assert isinstance(router, RetrievalRouter)
    assert router.route(texts) == RetrievalRouter(made, router.selection).route(texts)
    assert [route.adapters[0] for route in router.route(texts)] == list(made.labels)
