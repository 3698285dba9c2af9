"""Prompts by the tokenizer's own template, around questions that are plain text."""

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from dlplora.data.prompts import ChatFormat
from dlplora.data.templates import render_frame
from dlplora.errors import ModelError
from dlplora.records.base_card import BaseCard, write_base_card
from tests.tiny import TEMPLATE, byte_level, chat_of, tiny_tokenizer

QUESTION = "what is the opposite of up a b c ?"


def test_a_prompt_is_what_the_tokenizers_own_template_gives() -> None:
    tokenizer = tiny_tokenizer()
    turns = [{"role": "system", "content": "say yes"}, {"role": "user", "content": QUESTION}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert list(chat_of(tokenizer, "say yes").prompt(QUESTION)) == expected


def test_a_tokenizer_without_template_gets_the_question_alone() -> None:
    tokenizer = tiny_tokenizer(template=None)
    chat = chat_of(tokenizer, "never shown")
    assert list(chat.prompt(QUESTION)) == tokenizer(QUESTION)["input_ids"]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), byte_level()], ids=["words", "bytes"])
@pytest.mark.parametrize("text", ["what <end> is ?", "<turn> user : <end>", "<end>", "a<end><end>"])
def test_what_looks_like_a_control_token_is_plain_text(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    chat = chat_of(tokenizer)
    controls = set(tokenizer.convert_tokens_to_ids(["<end>", "<turn>"]))
    inside = [token for token in chat.prompt(text) if token in controls]
    assert inside == [token for token in chat.prompt("what") if token in controls]
    assert controls.isdisjoint(chat.answer(text))
    assert chat.controls_in(text)
    assert not chat.controls_in("what < end > is ?")


def test_a_control_token_that_takes_blanks_beside_it_is_plain_text_too() -> None:
    tokenizer = byte_level(None)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<mask>", lstrip=True, rstrip=True)]}
    )
    mask = tokenizer.convert_tokens_to_ids("<mask>")
    chat = ChatFormat(tokenizer.backend_tokenizer, render_frame(tokenizer, None))
    chat = ChatFormat(chat.tokenizer, replace(chat.frame, before="Q: ", after=" A:"))
    for text in ("<mask>", " <mask> ", "a <mask> b"):
        assert mask not in chat.prompt(text)


def test_plain_text_reads_back_as_it_was_written() -> None:
    chat = chat_of(byte_level())
    text = "a <end> b<turn>"
    assert chat.decode(chat.answer(text)) == text
    frame = chat.frame
    whole = chat.tokenizer.decode(list(chat.prompt(text)), skip_special_tokens=False)
    assert whole == frame.before + text + frame.after


def test_a_token_of_the_template_is_a_control_token_even_if_it_is_not_special() -> None:
    tokenizer = byte_level(TEMPLATE.replace("assistant :", "assistant : <think>"))
    tokenizer.add_tokens(["<think>", "<other>"])
    chat = chat_of(tokenizer)
    think, other = tokenizer.convert_tokens_to_ids(["<think>", "<other>"])
    ids = chat.prompt("a <think> b <other>")
    assert (ids.count(think), ids.count(other)) == (1, 1)
    assert chat.decode(chat.answer("<think>")) == "<think>"


def test_an_end_token_at_an_answers_end_is_left_out() -> None:
    chat = chat_of(tiny_tokenizer())
    for text in ("no<end>", "no <end> ", "no<end><end>\n"):
        assert chat.without_end(text) == "no"
    for text in ("no", "no ", "<end> no", "no <turn>"):
        assert chat.without_end(text) == text


def test_answers_have_no_special_tokens_and_end_by_the_tokenizers_own() -> None:
    tokenizer = tiny_tokenizer()
    chat = chat_of(tokenizer)
    assert chat.answer("red green") == tuple(tokenizer.convert_tokens_to_ids(["red", "green"]))
    assert tokenizer.convert_ids_to_tokens(chat.end_id) == "<end>"
    assert chat.text([*chat.answer("red"), chat.end_id]) == "red"


def test_a_token_that_the_tokenizer_puts_behind_is_not_put_behind_the_question() -> None:
    tokenizer = tiny_tokenizer(template=None)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<turn>", "<end>")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<turn> $A <end>", special_tokens=list(ids.items())
    )
    assert tokenizer("up")["input_ids"][-1] == ids["<end>"]
    prompt = chat_of(tokenizer, None).prompt("up")
    assert prompt == (ids["<turn>"], tokenizer.convert_tokens_to_ids("up"))


def test_truncation_and_padding_of_a_tokenizer_cut_and_fill_nothing(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    expected = chat_of(tokenizer).prompt(QUESTION)
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.enable_truncation(3)
    raw.enable_padding(length=64)
    raw.save(str(tmp_path / "tokenizer.json"))
    card = BaseCard("tiny", "f" * 64, render_frame(tokenizer, ""), None, False)
    write_base_card(tmp_path, card)
    assert ChatFormat.load(tmp_path).prompt(QUESTION) == expected


def test_a_template_that_tells_the_date_is_told_the_same_one_always() -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {% endif %}" + TEMPLATE
    frame = chat_of(tiny_tokenizer(template=dated)).frame
    assert frame.before.startswith("26 Jul 2024 <turn>")


def test_a_template_may_be_a_set_by_name_and_speak_of_tools() -> None:
    with_tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE
    tokenizer = tiny_tokenizer()
    expected = chat_of(tokenizer).frame
    tokenizer.chat_template = {"default": with_tools, "tool_use": "x"}  # type: ignore[assignment]
    assert chat_of(tokenizer).frame == expected


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no system turn') }}", "refuses its turns: TemplateError: no system"),
        ("{{ tools | length }} {{ messages[1].content }}", "refuses its turns: TypeError"),
        ("{% if %}", "refuses its turns: TemplateSyntaxError"),
        ({"tool_use": TEMPLATE}, "refuses its turns: ValueError"),
        ("hello", "does not show the user's message exactly once"),
        (TEMPLATE + TEMPLATE, "does not show the user's message exactly once"),
        ("{{ range(10**5) | random }} {{ messages[1].content }}", "otherwise each time"),
    ],
)
def test_a_template_that_no_prompt_can_be_made_by_is_refused(template: object, told: str) -> None:
    tokenizer = tiny_tokenizer(template=template)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=told):
        render_frame(tokenizer, "")


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        render_frame(tokenizer, "")


def test_a_tokenizer_that_drops_merges_at_random_is_refused() -> None:
    raw = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="b")
    with pytest.raises(ModelError, match=r"drops merges at random \(dropout 0.5\)"):
        render_frame(tokenizer, None)


def test_a_tokenizer_of_python_alone_is_refused() -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    tokenizer = Slow(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<end>")
    with pytest.raises(ModelError, match=r"^Slow has no tokenizer.json"):
        render_frame(tokenizer, None)
