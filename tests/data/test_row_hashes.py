"""Hashes of rows: duplicates and contradictions, against a dictionary of whole rows."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlplora.data.items import Item
from dlplora.data.row_hashes import Place, RowHashes
from dlplora.errors import DataError

NONE = np.empty(0, dtype=np.uint64)
LAST = 2**64 - 1
FREE = Item("which?", ("red",), None, None)
RED = Item("which?", ("red",), ("red", "green"), None)
GREEN = Item("which?", ("green",), ("red", "green"), None)
BOTH = Item("which?", ("green", "red"), ("red", "green"), None)
MORE = Item("which?", ("red",), ("red", "green", "blue"), None)
TURNED = Item("WHICH ?", ("red",), ("green", "red"), "?")

Rows = list[tuple[int, Item] | None]


def _row_hashes(rows: Rows) -> RowHashes:
    """Take the rows in batches of three."""
    row_hashes = RowHashes()
    for first in range(0, len(rows), 3):
        batch = rows[first : first + 3]
        good = [row for row in batch if row is not None]
        places = np.array([place for place, _ in good], dtype=np.uint64)
        is_good = np.array([row is not None for row in batch])
        row_hashes.add(is_good, places, [item for _, item in good])
    return row_hashes


def _place(row: int) -> Place:
    """Number the rows of one file from 1."""
    return Place("x", "row", row + 1)


def _problems(rows: Rows) -> list[tuple[int, int]]:
    """Return who contradicts whom, by number."""
    row_hashes = _row_hashes(rows)
    found = []
    for row, problem in row_hashes.contradictions(_place, row_hashes.contradicting()):
        said, other = problem.removeprefix("contradicts row ").split(": ")[::-1]
        assert said == "same question, other answers"
        found.append((row + 1, int(other)))
    return found


def test_without_good_rows_there_are_no_questions() -> None:
    for row_hashes in (RowHashes(), _row_hashes([None, None])):
        assert row_hashes.questions(without=NONE).tolist() == []
        assert row_hashes.contradicting().tolist() == []
        assert row_hashes.contradictions(_place, NONE) == []
        row_hashes.check_one_kind(_place, without=NONE)


def test_questions_are_distinct_and_sorted_and_those_of_bad_rows_left_out() -> None:
    row_hashes = _row_hashes([(9, FREE), None, (LAST, FREE), (9, FREE), (3, FREE), None])
    assert row_hashes.questions(without=NONE).tolist() == [3, 9, LAST]
    without = np.array([9], dtype=np.uint64)
    assert row_hashes.questions(without=without).tolist() == [3, LAST]


def test_the_question_of_hash_zero_is_one_like_any_other() -> None:
    assert _row_hashes([None, (0, FREE), None]).questions(without=NONE).tolist() == [0]
    assert _problems([None, (0, RED), None]) == []


@pytest.mark.parametrize("other", [RED, TURNED])
def test_the_same_choice_again_is_no_contradiction(other: Item) -> None:
    assert _problems([(5, RED), (6, GREEN), (5, other)]) == []


@pytest.mark.parametrize("other", [GREEN, BOTH, MORE, FREE])
def test_another_choice_of_one_question_contradicts(other: Item) -> None:
    assert _problems([(5, RED), None, (6, RED), (5, other)]) == [(1, 4), (4, 1)]


def test_free_answers_never_contradict() -> None:
    other = Item("which?", ("green",), None, None)
    assert _problems([(5, FREE), (5, other)]) == []


def test_a_comma_in_an_option_is_told_from_two_options() -> None:
    one = Item("which?", ("a",), ("a", "b', 'c"), None)
    two = Item("which?", ("a",), ("a", "b", "c"), None)
    assert _problems([(5, one), (5, two)]) == [(1, 2), (2, 1)]


@pytest.mark.parametrize("mcq_first", [False, True])
def test_both_kinds_in_one_file_are_refused_with_their_first_rows(mcq_first: bool) -> None:
    rows: Rows = [None, (1, FREE), (2, FREE), (3, RED), (4, RED)]
    expected = "x: row 4 has options and row 2 has none; "
    if mcq_first:
        rows = [None, (3, RED), (4, RED), (1, FREE), (2, FREE)]
        expected = "x: row 2 has options and row 4 has none; "
    with pytest.raises(DataError) as caught:
        _row_hashes(rows).check_one_kind(_place, without=NONE)
    assert str(caught.value).startswith(expected)


def _place_in_two(row: int) -> Place:
    """Put two rows into a first file and the others into a second one."""
    return Place("a", "line", row + 1) if row < 2 else Place("b", "item", row - 1)


def test_a_row_of_another_file_is_named_with_its_file() -> None:
    row_hashes = _row_hashes([(5, RED), (6, RED), (5, GREEN), (5, RED)])
    other = "same question, other answers"
    assert row_hashes.contradictions(_place_in_two, row_hashes.contradicting()) == [
        (0, f"contradicts item 1 of b: {other}"),
        (2, f"contradicts line 1 of a: {other}"),
        (3, f"contradicts item 1: {other}"),
    ]
    with pytest.raises(DataError, match=r"^b: item 1 has options and line 2 of a has none; "):
        _row_hashes([None, (1, FREE), (2, RED)]).check_one_kind(_place_in_two, without=NONE)


def test_contradicting_questions_do_not_make_two_kinds() -> None:
    row_hashes = _row_hashes([(1, RED), (2, RED), (2, FREE), None])
    assert row_hashes.contradicting().tolist() == [2]
    row_hashes.check_one_kind(_place, without=row_hashes.contradicting())


hashes = st.integers(0, 6) | st.integers(LAST - 2, LAST)
row_lists = st.lists(
    st.none() | st.tuples(hashes, st.sampled_from([FREE, RED, GREEN, BOTH, MORE, TURNED])),
    max_size=40,
)


def _choice(item: Item) -> object:
    return item.options and (frozenset(item.options), item.answers)


@settings(deadline=None)
@given(rows=row_lists)
def test_contradictions_are_those_of_a_dictionary_of_whole_rows(rows: Rows) -> None:
    good = [(*row, number) for number, row in enumerate(rows, start=1) if row is not None]
    expected: dict[int, dict[int, object]] = {}
    for question, group in groupby(sorted(good, key=lambda row: row[0]), key=lambda row: row[0]):
        expected[question] = {number: _choice(item) for _, item, number in group}
    bad = {question for question, part in expected.items() if len(set(part.values())) > 1}
    row_hashes = _row_hashes(rows)
    assert row_hashes.contradicting().tolist() == sorted(bad)
    assert row_hashes.questions(without=NONE).tolist() == sorted(expected)
    left = row_hashes.questions(without=row_hashes.contradicting()).tolist()
    assert left == sorted(expected.keys() - bad)
    choices = {number: choice for part in expected.values() for number, choice in part.items()}
    questions = {number: question for question, _, number in good}
    problems = _problems(rows)
    assert [item for item, _ in problems] == sorted(n for q in bad for n in expected[q])
    for item, other in problems:
        assert questions[item] == questions[other]
        assert choices[item] != choices[other]
