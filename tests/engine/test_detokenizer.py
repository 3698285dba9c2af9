"""Text of tokens one by one against the tokenizer's own text of all of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dlplora.data.prompts import ChatFormat
from dlplora.engine.detokenizer import Detokenizer
from dlplora.records.base_card import Frame
from tests.tiny import tiny_tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """One token a byte, as GPT-2's tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Letters with a mark of spaces, and bytes for all else, as Llama's tokenizer."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefg"]
    vocabulary = {word: n for n, word in enumerate(words)}
    raw = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


CHATS = {
    name: ChatFormat(tokenizer.backend_tokenizer, Frame("", "", (), 0, 0, ()))
    for name, tokenizer in (
        ("bytes", byte_level()),
        ("fallback", byte_fallback()),
        ("words", tiny_tokenizer()),
    )
}


@pytest.mark.parametrize("name", ["bytes", "words"])
@settings(deadline=None)
@given(data=st.data())
def test_the_pieces_make_up_the_text_of_any_tokens(name: str, data: st.DataObject) -> None:
    chat = CHATS[name]
    ids = data.draw(st.lists(st.integers(0, chat.tokenizer.get_vocab_size() - 1), max_size=12))
    pieces = Detokenizer(chat)
    text = "".join(pieces.add(token) for token in ids) + pieces.rest()
    assert text.strip().replace("\ufffd", "") == chat.decode(ids).strip().replace("\ufffd", "")


@pytest.mark.parametrize("name", ["bytes", "fallback"])
@pytest.mark.parametrize("text", ["a 雨 b", "é", "👩‍🚀 c"])
def test_characters_of_several_tokens_come_whole(name: str, text: str) -> None:
    chat = CHATS[name]
    pieces = Detokenizer(chat)
    ids = chat.answer(text.replace(" ", "▁") if name == "fallback" else text)
    written = [pieces.add(token) for token in ids]
    assert "".join(written) == text
    assert not any("\ufffd" in piece for piece in written)
