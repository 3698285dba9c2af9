"""Many questions normalised at once, against one by one."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlplora.data.normalize import normalise_all
from dlplora.records.examples import normalise

ascii_letters = st.characters(min_codepoint=1, max_codepoint=127)
blanks = st.sampled_from(" \t\n\r\v\f\x1c\x1f")
letters = st.sampled_from("aB?") | blanks
valid = st.characters(exclude_characters="\0", exclude_categories=["Cs"])  # what UTF-8 can hold
texts = st.text(letters) | st.text(ascii_letters) | st.text(valid)


@settings(deadline=None, max_examples=500)
@example(questions=[])
@example(questions=[""])
@example(questions=["", " ", "  ", "a", ""])
@example(questions=[" a", "a ", "a  b", "", "é  E", " é", "a b"])
@given(questions=st.lists(texts, max_size=12))
def test_all_at_once_is_one_by_one(questions: list[str]) -> None:
    assert normalise_all(questions) == [normalise(question).encode() for question in questions]


def test_every_ascii_character_is_folded_wherever_it_stands() -> None:
    questions = [
        text
        for letter in map(chr, range(1, 128))
        for text in (letter, f"a{letter}B", f"{letter} {letter}", f" {letter}", f"{letter} ")
    ]
    assert normalise_all(questions) == [normalise(question).encode() for question in questions]
