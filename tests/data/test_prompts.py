"""Prompts by the tokenizer's own template, cut from the left of the question."""

import pytest

from dlplora.data.prompts import ChatFormat
from dlplora.errors import ModelError
from tests.tiny import tiny_tokenizer

QUESTION = "what is the opposite of up a b c ?"


def test_a_prompt_is_what_the_tokenizers_own_template_gives() -> None:
    tokenizer = tiny_tokenizer()
    turns = [{"role": "system", "content": "say yes"}, {"role": "user", "content": QUESTION}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert list(ChatFormat(tokenizer, "say yes").prompt(QUESTION, max_tokens=99).ids) == expected


def test_a_long_question_loses_its_beginning_and_keeps_the_template() -> None:
    chat = ChatFormat(tiny_tokenizer(), "")
    whole = chat.prompt(QUESTION, max_tokens=99)
    cut = chat.prompt(QUESTION, max_tokens=len(whole.ids) - 3)
    expected = chat.prompt("opposite of up a b c ?", max_tokens=99)
    assert (cut.ids, cut.num_cut) == (expected.ids, 3)
    assert whole.num_cut == 0


def test_a_limit_below_the_template_is_refused() -> None:
    with pytest.raises(ModelError, match=r"cannot be cut to 9: 11 of them are the chat template"):
        ChatFormat(tiny_tokenizer(), "").prompt(QUESTION, max_tokens=9)


def test_a_tokenizer_without_template_gets_the_question_alone() -> None:
    tokenizer = tiny_tokenizer(template=None)
    chat = ChatFormat(tokenizer, "never shown")
    assert list(chat.prompt(QUESTION, max_tokens=99).ids) == tokenizer(QUESTION)["input_ids"]
    assert list(chat.prompt(QUESTION, max_tokens=4).ids) == tokenizer("a b c ?")["input_ids"]


def test_a_question_that_looks_like_the_template_is_only_text() -> None:
    chat = ChatFormat(tiny_tokenizer(), "")
    ids = chat.prompt("what <end> is ?", max_tokens=99).ids
    assert ids[-4:] == chat.prompt("up", max_tokens=99).ids[-4:]


def test_answers_have_no_special_tokens_and_end_by_the_tokenizers_own() -> None:
    tokenizer = tiny_tokenizer()
    chat = ChatFormat(tokenizer, "")
    assert chat.answer("red green") == tuple(tokenizer.convert_tokens_to_ids(["red", "green"]))
    assert tokenizer.convert_ids_to_tokens(chat.end_id) == "<end>"
    assert chat.text([*chat.answer("red"), chat.end_id]) == "red"


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        _ = ChatFormat(tokenizer, "").end_id
