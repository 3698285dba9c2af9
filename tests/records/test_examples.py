"""Examples: round trips through parquet, and what makes two questions the same."""

import hashlib
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlplora.records.examples import (
    SPLITS,
    Example,
    example_id,
    examples_path,
    normalise,
    read_examples,
    write_examples,
)

QA = Example("1", "colours", "what is up ?\n雨", ("down", "é"), None, "up ?")
MCQ = Example("2", "colours", "which one ?", ("red",), ("red", "green"), None)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
examples = st.builds(
    Example,
    texts,
    texts,
    texts,
    st.lists(texts, max_size=3).map(tuple),
    st.none() | st.lists(texts, max_size=3).map(tuple),
    st.none() | texts,
)


def test_free_answers_and_multiple_choice_come_back_from_a_file(tmp_path: Path) -> None:
    write_examples(tmp_path / "a.parquet", [QA, MCQ])
    assert read_examples(tmp_path / "a.parquet") == [QA, MCQ]


@given(st.lists(examples, max_size=4))
def test_any_examples_come_back_from_a_file(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Example]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    write_examples(path, rows)
    assert read_examples(path) == rows


def test_equal_examples_give_equal_bytes(tmp_path: Path) -> None:
    write_examples(tmp_path / "a.parquet", [QA, MCQ])
    write_examples(tmp_path / "b.parquet", [Example(**vars(QA)), Example(**vars(MCQ))])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_the_kind_follows_from_the_options() -> None:
    assert (QA.kind, MCQ.kind) == ("qa", "mcq")


def test_each_task_and_split_has_a_file_of_its_own() -> None:
    paths = [examples_path(Path("x"), split, task) for split in SPLITS for task in ("a", "b")]
    assert len(set(paths)) == 6
    assert paths[0] == Path("x/train/a.parquet")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is UP?", "What is UP?"),  # case is another question
        ("  what\n\tis \r\n up? ", "what is up?"),
        ("what\u00a0is\u2003up?", "what is up?"),  # spaces of other widths
        ("ｗｈａｔ ｉｓ ｕｐ？", "ｗｈａｔ ｉｓ ｕｐ？"),  # and so is width
        ("ﬁne", "ﬁne"),  # a ligature
        ("Straße", "Straße"),
        ("e\u0301tude", "\u00e9tude"),  # an accent of its own
        ("x²", "x²"),
        ("", ""),
        ("what is up ?", "what is up ?"),  # white space is folded, not removed
        ("wh-at", "wh-at"),
    ],
)
def test_normalising_folds_accents_and_white_space(question: str, expected: str) -> None:
    assert normalise(question) == expected


def _written_out(question: str) -> str:
    return " ".join(unicodedata.normalize("NFC", question).split())


@given(question=st.text() | st.text(st.characters(max_codepoint=127)))
def test_normalising_is_its_definition(question: str) -> None:
    assert normalise(question) == _written_out(question)


def test_every_ascii_character_is_normalised_by_the_definition() -> None:
    for letter in map(chr, range(128)):
        for text in (letter, f"a{letter}B", f"{letter} {letter}", f" {letter}"):
            assert normalise(text) == _written_out(text)


def test_the_id_is_the_hash_of_task_and_normalised_question() -> None:
    expected = hashlib.sha256(b"colours\0What is up?").hexdigest()
    assert example_id("colours", " What is\nup? ") == expected
    assert example_id("colours", "What is up?") == expected


@pytest.mark.parametrize(
    ("task", "question"), [("colour", "what is up?"), ("colours", "what is up"), ("", "colours")]
)
def test_another_task_or_question_has_another_id(task: str, question: str) -> None:
    assert example_id(task, question) != example_id("colours", "what is up?")


def test_the_border_between_task_and_question_counts() -> None:
    assert example_id("ab", "c") != example_id("a", "bc")
