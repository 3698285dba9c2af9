"""Sentences of a growing text: boundaries only where the whole text has them, and never early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlplora.engine.sentences import Sentences

TEXTS = [
    ("Dr. Smith paid $3.50. He left at 5 p.m. on Monday! Was it ok?", 3),
    ("He has e.g. two of them. She has 3.14 apples.", 2),
    ("他走了。她没有。好", 3),
    ("one\ntwo three\nfour", 3),
    ("red", 1),
    ("Yes.\n\nNo.", 2),
    ('He said "no." Then he left.', 2),
    ("   ", 0),
    ("", 0),
]


def written(pieces: list[str]) -> tuple[Sentences, list[bool]]:
    sentences = Sentences()
    return sentences, [sentences.add(piece) for piece in pieces]


@pytest.mark.parametrize(("text", "count"), TEXTS)
def test_a_text_written_by_the_letter_has_the_sentences_of_the_whole(text: str, count: int) -> None:
    sentences, begun = written(list(text))
    assert len(sentences.all) == count
    assert "".join(sentences.all) == text or not text.strip()
    assert sum(begun) == max(count - 1, 0)
    assert len(written([text])[0].all) <= max(count, 1)


@pytest.mark.parametrize("text", ["It costs 3.", "It was Dr.", "Yes. ", "Yes.\n"])
def test_a_boundary_waits_for_the_next_sentence(text: str) -> None:
    sentences, begun = written(list(text))
    assert not any(begun)
    assert sentences.add("5") == (text[-1].isspace())


@given(st.lists(st.text("ab. \n!?3Dr。", max_size=4), max_size=12))
def test_nothing_is_lost_and_every_boundary_is_told(pieces: list[str]) -> None:
    sentences = Sentences()
    for piece in pieces:
        before = len(sentences.all)
        began = sentences.add(piece)
        assert not began or len(sentences.all) == max(before, 1) + 1
    assert "".join(sentences.all).split() == "".join(pieces).split()
