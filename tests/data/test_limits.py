"""How long items may be: too long ones are bad rows, also in `validate`, and end tokens go."""

from pathlib import Path
from typing import Any

import pytest

from dlplora.data.ingest import Ingested, ingest, validate
from dlplora.data.limits import ItemLimit
from dlplora.errors import DataError
from dlplora.params.inputs import Splits
from tests.tiny import chat_of, choices, opposites, tiny_tokenizer, write_raw

SPLITS = Splits(train=400, validation=50, test=60, shares=(0.75, 0.10, 0.15), least=(1, 1, 1))
CHAT = chat_of(tiny_tokenizer())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "raw.json"


def _ingest(file: Path, items: list[Any], limit: ItemLimit | None, bad: Any = "refuse") -> Ingested:
    write_raw(file, items)
    return ingest(file, "task", keys="auto", on_bad_row=bad, splits=SPLITS, limit=limit)


def _tokens(item: dict[str, Any]) -> int:
    return len(CHAT.prompt(item["Q"])) + len(CHAT.answer(item["A"])) + 1


@pytest.mark.parametrize("context", [None, 5000])
def test_an_item_that_just_fits_is_taken_and_one_more_token_is_named(
    file: Path, context: int | None
) -> None:
    long = {"Q": "up " * 100, "A": "down " * 300}
    size = _tokens(long)
    items = [*opposites(40), long]
    assert _ingest(file, items, ItemLimit(CHAT, size, context)).findings.distinct == 41
    limit = ItemLimit(CHAT, size - 1, context)
    with pytest.raises(DataError) as caught:
        _ingest(file, items, limit)
    assert f"item 41 has {size} tokens" in str(caught.value)
    assert "raise adapter.max_tokens" in str(caught.value)
    assert ("(the model reads 5,000)" in str(caught.value)) == (context is not None)
    (problem,) = validate(file, keys="auto", splits=SPLITS, limit=limit).problems
    assert problem.item == 41
    skipped = _ingest(file, items, limit, "skip")
    assert skipped.findings.skipped == 1
    assert skipped.examples == _ingest(file, opposites(40), limit).examples


def test_a_model_that_reads_less_bounds_items_too(file: Path) -> None:
    items = opposites(40)
    least = max(map(_tokens, items))
    assert _ingest(file, items, ItemLimit(CHAT, 1024, least)).findings.distinct == 40
    with pytest.raises(DataError, match=f"at most {least - 1} are read: shorten it, or leave"):
        _ingest(file, items, ItemLimit(CHAT, 1024, least - 1))


def test_a_long_option_counts_like_an_answer(file: Path) -> None:
    items = choices(40)
    items[7] = items[7] | {"options": [*items[7]["options"], "up " * 500]}  # type: ignore[misc]
    with pytest.raises(DataError, match="item 8 has 5"):
        _ingest(file, items, ItemLimit(CHAT, 256, None))


def test_end_tokens_behind_answers_are_stripped_and_control_tokens_counted(file: Path) -> None:
    limit = ItemLimit(CHAT, 256, None)
    items: list[dict[str, Any]] = [*opposites(40), {"Q": "say <turn> user :", "A": "up <turn>"}]
    expected = _ingest(file, items, limit)
    ended = [item | {"A": f"{item['A']}<end>"} for item in items]
    found = _ingest(file, ended, limit)
    assert found.examples == expected.examples
    assert (found.findings.stripped, expected.findings.stripped) == (41, 0)
    assert found.findings.controls == expected.findings.controls == {"<turn>": 2}
    notes = validate(file, keys="auto", splits=SPLITS, limit=limit).notes
    assert notes == (
        "2 texts hold <turn>, read as plain text",
        "41 answers and options end in the end token, which is left out",
    )


def test_options_and_answers_lose_their_end_tokens_together(file: Path) -> None:
    items = choices(40)
    ended = [
        {
            "Q": item["Q"],
            "A": f"{item['A']}<end>",
            "options": [f"{option} <end>" for option in item["options"]],  # type: ignore[attr-defined]
        }
        for item in items
    ]
    limit = ItemLimit(CHAT, 256, None)
    assert _ingest(file, ended, limit).examples == _ingest(file, items, limit).examples


def test_an_answer_of_nothing_but_an_end_token_is_bad(file: Path) -> None:
    with pytest.raises(DataError, match="item 41 has an answer of nothing but ' <end>'"):
        _ingest(file, [*opposites(40), {"Q": "up", "A": " <end>"}], ItemLimit(CHAT, 256, None))
