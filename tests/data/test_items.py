"""Items: what a reader makes of one row, beyond what whole files show."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlplora.data.items import BadRowError, Item, Reader
from dlplora.data.raw import Unreadable
from dlplora.errors import DataError
from dlplora.params.inputs import Keys


def _item(row: Any, *, text_cells: bool = False) -> Item:
    return Reader("auto", text_cells=text_cells).item(row)


def _problem(row: Any, *, text_cells: bool = False) -> str:
    with pytest.raises(BadRowError) as caught:
        _item(row, text_cells=text_cells)
    return str(caught.value)


def test_one_answer_is_a_list_of_one() -> None:
    assert _item({"Q": "up", "A": "down"}) == _item({"Q": "up", "A": ["down"]})
    assert _item({"Q": " up ", "A": " down "}) == Item(" up ", (" down ",), None, None)


def test_answers_are_distinct_and_sorted_and_options_in_their_order() -> None:
    row = {"Q": "which?", "A": ["b", "a", "b"], "options": ["c", "b", "a"], "bare": "?"}
    assert _item(row) == Item("which?", ("a", "b"), ("c", "b", "a"), "?")


@pytest.mark.parametrize("bare", [3, None, ["up"], True])
def test_a_bare_question_that_is_no_string_is_left_out(bare: object) -> None:
    assert _item({"Q": "up", "A": "down", "bare": bare}).bare is None


def test_an_unreadable_row_says_its_own_problem() -> None:
    assert _problem(Unreadable("is not JSON: x")) == "is not JSON: x"


def test_cells_of_json_lists_count_as_lists() -> None:
    row = {"Q": "which?", "A": '["red", "blue"]', "options": '["red", "green", "blue"]'}
    expected = Item("which?", ("blue", "red"), ("red", "green", "blue"), None)
    assert _item(row, text_cells=True) == expected


@pytest.mark.parametrize(
    "cell",
    [
        "[",
        "[]",
        "[1, 2]",
        "[up]",
        '["up", 3]',
        '["up", null]',
        '["up"',
        '["up"] and more',
        '[["up"]]',
        '["\\ud800"]',
        ' ["up"]',
        '{"up": 1}',
        '"up"',
        "[" * 100_000,
    ],
)
def test_a_cell_that_is_no_list_of_strings_stays_text(cell: str) -> None:
    assert _item({"Q": "up", "A": cell}, text_cells=True).answers == (cell,)


def test_only_cells_of_text_are_searched_for_lists() -> None:
    assert _item({"Q": "up", "A": '["down"]'}).answers == ('["down"]',)
    assert _item({"Q": '["up"]', "A": "down"}, text_cells=True).question == '["up"]'


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ('["down", ""]', "has an empty 'A'"),
        ('["do\\u0000wn"]', "has a NUL character in 'A'"),
    ],
)
def test_a_bad_list_in_a_cell_is_named(cell: str, problem: str) -> None:
    assert _problem({"Q": "up", "A": cell}, text_cells=True) == problem


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
answers = st.lists(texts.filter(str.strip), min_size=1, max_size=4)


@settings(deadline=None)
@given(answers=answers)
def test_a_list_reads_the_same_from_a_cell(answers: list[str]) -> None:
    cell = json.dumps(answers, ensure_ascii=False)
    from_cell = _item({"Q": "up", "A": cell}, text_cells=True)
    assert from_cell == _item({"Q": "up", "A": answers})
    assert from_cell.answers == tuple(sorted(set(answers)))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"A": "down"}, "has no question (keys: A)"),
        ({"question": "up"}, "has no answer (keys: question)"),
        ({"OUTPUT": "down", "x": 1}, "has no question (keys: OUTPUT, x)"),
        ({"x": 1}, "has no question and no answer (keys: x)"),
        ({}, "has no question and no answer (keys: none)"),
        (
            {"Q": "up", "A": "down", "input": "up", "output": "down"},
            "has more than one question or answer (keys: Q, A, input, output)",
        ),
    ],
)
def test_a_row_without_one_known_pair_says_what_it_lacks(
    row: dict[str, object], problem: str
) -> None:
    assert _problem(row) == problem


@pytest.mark.parametrize(
    "row",
    [
        {"first\nname": 1, " \r\n": 2, "x" * 10_000: 3},
        {f"key {number}": "x" for number in range(10_000)},
        {"Q": "which?", "A": "red" * 10_000, "options": ["green\n" * 10_000, "blue"]},
        {"Q": "which?", "A": "red", "options": ["red"] * 10_000},
    ],
)
def test_a_problem_is_one_line_of_bounded_length(row: dict[str, object]) -> None:
    problem = _problem(row)
    assert "\n" not in problem
    assert len(problem) < 2000


def test_of_two_spellings_of_a_key_the_one_in_capitals_is_read() -> None:
    for row in ({"Q": "up", "q": "no", "A": "down"}, {"q": "no", "Q": "up", "A": "down"}):
        assert _item(row).question == "up"


def test_rows_may_hold_their_keys_in_any_order_and_some_no_options() -> None:
    reader = Reader("auto", text_cells=False)
    first = reader.item({"Q": "up", "A": "down", "options": ["down", "left"]})
    assert reader.item({"options": ["down", "left"], "A": "down", "Q": "up"}) == first
    assert reader.item({"A": "down", "Q": "up", "note": 1}).options is None
    assert reader.settled_keys(Path("x")) == Keys(
        question="Q", answer="A", options="options", context=[]
    )


def test_two_pairs_in_one_file_are_refused() -> None:
    reader = Reader("auto", text_cells=False)
    reader.item({"Q": "up", "A": "down"})
    reader.item({"input": "up", "output": "down"})
    with pytest.raises(DataError, match=r"^x: found the keys Q, A, input, output; expected the"):
        reader.settled_keys(Path("x"))


def test_a_reader_tells_whether_it_met_objects() -> None:
    reader = Reader("auto", text_cells=False)
    rows: list[Any] = [3, "up", None, [], Unreadable("is not JSON")]
    for row in rows:
        with pytest.raises(BadRowError):
            reader.item(row)
    assert not reader.met_objects
    reader.item({"Q": "up", "A": "down"})
    assert reader.met_objects
