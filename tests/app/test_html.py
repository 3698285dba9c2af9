"""The HTML of the pages: texts stay texts, and numbers, mixes and shares are told."""

from dlplora.app.html import Palette, confusion, link, mix_of, passages, said, table

NASTY = "<script>alert('x')</script>"


def part(text: str, adapters: dict[str, float] | None, question: str | None = None) -> dict:  # type: ignore[type-arg]
    return {"text": text, "adapters": adapters, "confidence": 0.5, "question": question}


def test_no_text_becomes_markup() -> None:
    told = [
        said(NASTY),
        link(NASTY, f'"><{NASTY}'),
        table([NASTY], [[NASTY, 1, 0.5, None, True]], title=NASTY, empty=""),
        table([], [], title="", empty=NASTY),
        confusion([NASTY], [[3]]),
        passages([part(NASTY, {NASTY: 1.0}, NASTY)], Palette()),
    ]
    assert "<script" not in "".join(told)


def test_a_mix_is_told_in_words() -> None:
    assert mix_of({"past_tense": 1.0}) == "past_tense"
    assert mix_of({"a": 0.25, "b": 0.75}) == "b 0.75 + a 0.25"
    assert mix_of({}) == "base model"
    assert mix_of(None) == "weights by token"


def test_an_adapter_keeps_its_colour_and_the_base_model_has_none() -> None:
    palette = Palette()
    first = palette.shade({"a": 0.6, "b": 0.4})
    second = palette.shade({"b": 1.0})
    assert first != second
    assert palette.shade({"a": 1.0}) == first
    assert palette.shade({}) == palette.shade(None) == 0


def test_each_passage_stands_with_its_adapters_and_in_the_legend() -> None:
    told = passages([part("one", {"a": 1.0}, "first?"), part("two", {"b": 1.0})], Palette())
    assert told.index("first?") < told.index("one") < told.index("two") < told.index("legend")
    assert told.count("confidence 0.50") == 2


def test_a_share_of_a_row_is_its_count_by_the_rows_sum() -> None:
    told = confusion(["a", "b"], [[3, 1], [0, 0]])
    assert "--share: 0.75" in told
    assert "--share: 0.25" in told
    assert told.count("--share: 0.0") == 2
