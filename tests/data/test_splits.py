"""Splits: places by SHA-256, shares, and the first places whatever the order of offers."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlplora.data.items import Item
from dlplora.data.splits import FirstPlaces, borders_of, count_by_split, places_of
from dlplora.params.inputs import Splits
from dlplora.records.examples import example_id, normalise

END = 2**64
QUARTERS = Splits(train=9, validation=9, test=9, shares=(0.5, 0.25, 0.25), least=(1, 1, 1))
USUAL = QUARTERS.model_copy(update={"shares": (0.75, 0.10, 0.15)})
ALL_TRAIN = QUARTERS.model_copy(update={"shares": (1, 0, 0)})
ALL_TEST = QUARTERS.model_copy(update={"shares": (0, 0, 1)})
NO_VALIDATION = QUARTERS.model_copy(update={"shares": (0.5, 0, 0.5)})
ANY = [QUARTERS, USUAL, ALL_TRAIN, ALL_TEST, NO_VALIDATION]


def place_of(question: str) -> int:
    (place,) = places_of([question]).tolist()
    return int(place)


@pytest.mark.parametrize("question", ["", "Up  ?", " up ?", "é雨", "a\u2028b", "ﬁ", "up\t"])
def test_a_place_is_the_first_8_bytes_of_the_hash(question: str) -> None:
    text = normalise(question).encode()
    assert place_of(question) == int(hashlib.sha256(text).hexdigest()[:16], 16)


def test_places_come_in_the_order_of_questions() -> None:
    questions = [f"q{number}" for number in range(40)]
    assert places_of(questions).tolist() == [place_of(question) for question in questions]
    assert places_of([]).tolist() == []


@pytest.mark.parametrize(
    ("splits", "shares"),
    [
        (QUARTERS, (0.5, 0.25, 0.25)),
        (ALL_TRAIN, (1, 0, 0)),
        (ALL_TEST, (0, 0, 1)),
        (NO_VALIDATION, (0.5, 0, 0.5)),
    ],
)
def test_the_borders_cut_all_places_by_the_shares(
    splits: Splits, shares: tuple[float, float, float]
) -> None:
    validation, test = borders_of(splits)
    assert (validation, test - validation, END - test) == tuple(share * END for share in shares)


edges = st.sampled_from([END // 4 * part + shift for part in (1, 2, 3) for shift in range(-3, 4)])


@settings(deadline=None)
@given(places=st.lists(st.integers(0, END - 1) | edges, max_size=60), splits=st.sampled_from(ANY))
def test_counting_agrees_with_comparing_one_by_one(places: list[int], splits: Splits) -> None:
    validation, test = borders_of(splits)
    expected = {
        "train": sum(place < validation for place in places),
        "validation": sum(validation <= place < test for place in places),
        "test": sum(test <= place for place in places),
    }
    counted = count_by_split(np.sort(np.array(places, dtype=np.uint64)), (validation, test))
    assert counted == expected


def _item(question: str, answer: str = "down", bare: str | None = None) -> Item:
    return Item(question, (answer,), None, bare)


def _kept(first: FirstPlaces) -> list[str]:
    return [example.question for example in first.examples("task")]


@settings(deadline=None)
@given(
    questions=st.lists(st.sampled_from([f"q{number}" for number in range(30)]), max_size=60),
    cap=st.integers(1, 12),
)
def test_the_first_places_are_kept_with_all_their_answers(questions: list[str], cap: int) -> None:
    first = FirstPlaces(cap)
    expected: dict[str, set[str]] = {}
    for number, question in enumerate(questions):
        first.offer(place_of(question), _item(question, f"a{number}"))
        expected.setdefault(question, set()).add(f"a{number}")
    examples = first.examples("task")
    assert [example.question for example in examples] == sorted(expected, key=place_of)[:cap]
    for example in examples:
        assert set(example.answers) == expected[example.question]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), cap=st.integers(1, 40))
def test_the_order_of_offers_changes_nothing(seed: int, cap: int) -> None:
    offers = [(f"q{number % 30}", f"a{number}") for number in range(60)]
    results = []
    for order in (offers, random.Random(seed).sample(offers, len(offers))):
        first = FirstPlaces(cap)
        for question, answer in order:
            first.offer(place_of(question), _item(question, answer))
        results.append(first.examples("task"))
    assert results[0] == results[1]


def test_the_last_place_of_all_is_kept() -> None:
    first = FirstPlaces(2)
    for place in (END - 1, 0):
        first.offer(place, _item(str(place)))
    assert _kept(first) == ["0", str(END - 1)]
    first.offer(5, _item("5"))
    first.offer(END - 1, _item(str(END - 1), "again"))
    assert _kept(first) == ["0", "5"]


def test_items_of_one_question_make_one_example() -> None:
    first = FirstPlaces(3)
    for item in (
        Item("up  ?", ("down",), ("down", "left"), None),
        Item(" up ?", ("down", "left"), ("left", "down"), "up"),
        Item("up ?", ("down",), None, "Up"),
    ):
        first.offer(place_of("up ?"), item)
    (example,) = first.examples("task")
    assert example.id == example_id("task", "up ?")
    assert example.question == " up ?"
    assert example.answers == ("down", "left")
    assert example.options == ("down", "left")
    assert example.bare == "Up"


def test_an_item_that_comes_a_thousand_times_is_held_once() -> None:
    first = FirstPlaces(3)
    for _ in range(1000):
        first.offer(7, Item("up ?", ("down",), None, None))
    assert len(first._items[-7, "up ?"]) == 1
    assert len(first.examples("task")) == 1
