"""Words of any script, against rouge-score's own tokenizer where that knows the script."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics.bleu import BLEU

from dlplora.data.scripts import StemmedWords, bleu_tokenizer, words_of

SAME = {
    "Russian": "Сегодня утром в городе светит тёплое солнце",
    "Hindi": "आज सुबह शहर में धूप खिली हुई है",
    "Arabic": "تشرق الشمس هذا الصباح في المدينة",
    "Chinese": "今天早上城里阳光明媚",
    "Japanese": "今朝は町に暖かい日が差している",
    "Thai": "เช้านี้แดดอุ่นในเมือง",
    "Korean": "오늘 아침 도시에 따뜻한 햇살이 비친다",
    "Greek": "Σήμερα το πρωί λάμπει ο ήλιος",
    "signs": "(( ))",
    "one word": "да",
}


@given(text=st.text(string.printable))
def test_words_of_ascii_are_those_of_rouge_score(text: str) -> None:
    if expected := DefaultTokenizer(use_stemmer=True).tokenize(text):
        assert StemmedWords().tokenize(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Тёплое солнце!", ["тёплое", "солнце"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
        ("阳光 and 雨", ["阳", "光", "and", "雨"]),
        ("un café", ["un", "café"]),
        ("(( ))", ["(", "(", ")", ")"]),
        (" ", []),
    ],
)
def test_letters_and_their_marks_make_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_sacrebleu_scores_a_right_answer_as_right_by_the_tokenizer_of_its_script(text: str) -> None:
    bleu = BLEU(effective_order=True, tokenize=bleu_tokenizer(text))
    assert bleu.sentence_score(text, [text]).score == pytest.approx(100)


def test_the_tokenizer_is_that_of_most_letters() -> None:
    assert bleu_tokenizer("The character 水 means water.") == "13a"
    assert bleu_tokenizer("東京都、東京に行く") == "ja-mecab"
    assert bleu_tokenizer("水 (H2O) 是一种无机化合物") == "zh"
    assert bleu_tokenizer("42") == "13a"


def test_chinese_and_japanese_have_tokenizers_of_their_own() -> None:
    names = {name: bleu_tokenizer(text) for name, text in SAME.items()}
    assert names == dict.fromkeys(SAME, "13a") | {
        "Chinese": "zh",
        "Japanese": "ja-mecab",
        "Thai": "char",
    }
