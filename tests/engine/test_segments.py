"""The questions of a prompt: lists in many formats, and texts cut where the router is surer."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from math import log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlplora.engine.segments import MAX_SEGMENTS, Segment, numbered, segments_of
from dlplora.errors import GenerationError
from dlplora.records.routes import BASE_ROUTE, Route

QUESTIONS = ("past tense of go ?", "is it cold ?", "one plus two ?")


def always(texts: Sequence[str]) -> list[Route]:
    """Be sure of everything but of what introduces a list."""
    return [Route(("a",), (1.0,), 0.2 if text.startswith("Answer") else 0.9) for text in texts]


@pytest.mark.parametrize("before", ["", "Answer these questions:\n"])
@pytest.mark.parametrize(
    ("form", "labels"),
    [
        ("{}. ", "123"),
        ("{}) ", "123"),
        ("({}) ", "123"),
        ("{}: ", "123"),
        ("({}) ", "abc"),
        ("{}) ", "abc"),
        ("{}. ", "ABC"),
        ("Q{}: ", "123"),
        ("Q{}. ", "123"),
        ("Question {}: ", "123"),
        ("**Question {}:** ", "123"),
        ("### Question {}\n", "123"),
        ("{}．", "１２３"),
        ("{}、", "１２３"),
        ("（{}）", "123"),
        ("{}、", "一二三"),
        ("第{}题：", "一二三"),
        ("（{}）", "一二三"),
        ("{} ", "①②③"),
    ],
)
def test_a_list_is_cut_at_its_numbers(before: str, form: str, labels: str) -> None:
    lines = [form.format(label) + text for label, text in zip(labels, QUESTIONS, strict=True)]
    found = segments_of(before + "\n".join(lines), always)
    assert [one.text for one in found] == list(QUESTIONS)
    assert [one.label for one in found] == [form.format(one).strip("#* \n") for one in labels]


@pytest.mark.parametrize("mark", "-*+•")
def test_a_list_of_bullets_is_cut(mark: str) -> None:
    text = "\n".join(f"{mark} {one}" for one in QUESTIONS)
    assert [one.text for one in segments_of(text, always)] == list(QUESTIONS)


def test_a_list_may_stand_in_one_line_and_hold_another_list() -> None:
    found = segments_of("1. one ? 2. two ?\n(a) red\n(b) blue 3. three ?", always)
    assert [one.text for one in found] == ["one ?", "two ?\n(a) red\n(b) blue", "three ?"]


@pytest.mark.parametrize(
    "text",
    [
        "what is 1.5 plus 2.5 ?",
        "I have 2. apples",
        "1. only one",
        "2. two\n3. three",
        "it is 12:30 now",
        "( ( [ ) ] )",
        "三一、one 二、two",
        "* " * 9_000,
        "\n" * 9_000,
        "1.\n2.",
        "",
    ],
)
def test_numbers_that_do_not_count_up_from_one_are_no_list(text: str) -> None:
    assert numbered(text) is None


def test_chinese_numerals_count_beyond_ten() -> None:
    numerals = ["一", "二", "三", "四", "五", "六", "七", "八", "九", "十", "十一", "十二"]
    text = "\n".join(f"{one}、is it cold ?" for one in numerals)
    assert [one.label for one in segments_of(text, always)] == [f"{one}、" for one in numerals]


def test_a_number_that_nothing_follows_is_no_question() -> None:
    found = segments_of("1. one ?\n2. two ?\n3. ", always)
    assert [one.text for one in found] == ["one ?", "two ?"]


def test_a_long_list_that_is_none_of_questions_is_left_whole() -> None:
    text = "Sum up:\n" + "\n".join(f"- point {n}" for n in range(60))
    assert segments_of(text, lambda texts: [Route(("a",), (1.0,), 0.3) for _ in texts]) == (
        Segment(text),
    )


def test_a_list_that_belongs_to_one_question_is_left_whole() -> None:
    text = "which colour is it ?\n1. red\n2. blue"

    def sure(texts: Sequence[str]) -> list[Route]:
        return [Route(("a",), (1.0,), 0.9 if "?" in text else 0.3) for text in texts]

    assert segments_of(text, sure) == (Segment(text),)
    unsure = "Answer:\n1. red\n2. is it cold ?"
    assert segments_of(unsure, sure) == (Segment(unsure),)


def unsure_of_all(texts: Sequence[str]) -> list[Route]:
    return [BASE_ROUTE for _ in texts]


def test_without_confidence_a_list_is_cut_and_nothing_else() -> None:
    text = "\n".join(f"{n}. {one}" for n, one in enumerate(QUESTIONS, start=1))
    assert len(segments_of(text, unsure_of_all)) == 3
    plain = " ".join(QUESTIONS)
    assert segments_of(plain, unsure_of_all) == (Segment(plain),)


def test_too_many_questions_are_refused() -> None:
    for count in (MAX_SEGMENTS, MAX_SEGMENTS + 1):
        text = "\n".join(f"{n}. is it cold ?" for n in range(1, count + 1))
        if count == MAX_SEGMENTS:
            assert len(segments_of(text, always)) == count
        else:
            with pytest.raises(GenerationError, match=f"holds {count} questions, expected at most"):
                segments_of(text, always)


def test_one_sentence_costs_no_look() -> None:
    def never(_: Sequence[str]) -> list[Route]:
        raise AssertionError

    assert segments_of("what is up ?", never) == (Segment("what is up ?"),)


@given(st.data(), st.integers(2, 5))
def test_no_other_cuts_make_the_router_surer(data: st.DataObject, size: int) -> None:
    words = ("red", "blue", "green", "grey", "black")
    sentences = [f"The colour is {word}." for word in words[:size]]
    known = {
        " ".join(sentences[first:last]): Route(
            (data.draw(st.sampled_from("abc")),), (1.0,), data.draw(st.floats(0.05, 1))
        )
        for first, last in combinations(range(size + 1), 2)
    }

    def worth(parts: Sequence[str]) -> float:
        return sum(log(known[part].confidence or 0) + 0.1 for part in parts)

    found = segments_of(" ".join(sentences), lambda texts: [known[text] for text in texts])
    parts = [one.text for one in found]
    assert " ".join(parts) == " ".join(sentences)
    for count in range(size):
        for cuts in combinations(range(1, size), count):
            bounds = [0, *cuts, size]
            other = [" ".join(sentences[a:b]) for a, b in pairwise(bounds)]
            if all(known[a].first != known[b].first for a, b in pairwise(other)):
                assert worth(parts) >= worth(other) - 1e-9
    assert all(known[a].first != known[b].first for a, b in pairwise(parts))
