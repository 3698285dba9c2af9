"""Ingest of random files against an obvious reference that holds everything in memory."""

import hashlib
import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlplora.data.ingest import Ingested, ingest, validate
from dlplora.errors import DataError, DlpLoraError
from dlplora.params.inputs import Splits
from dlplora.records.examples import SPLITS, Example, Split, normalise
from tests.tiny import choices, opposites

SHARES = (0.5, 0.25, 0.25)
LARGE = Splits(train=500, validation=500, test=500, shares=SHARES, least=(1, 1, 1))
CAPPED = Splits(train=7, validation=3, test=2, shares=SHARES, least=(1, 1, 1))

letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
texts = st.text(letters, min_size=1, max_size=6)
words = st.sampled_from(["up", "left", "Straße", "ÉTÉ", "ﬁne", "雨", "ſo", "I", "ı", "Ⅳ", "ΣΑΣ"])
spaces = st.sampled_from([" ", "  ", "\t", "\n", "\u00a0", "\u2003", "\x1f"])


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """Return few questions in many variants of case, width and white space."""
    text = draw(spaces).join(draw(st.lists(words, min_size=1, max_size=2)))
    changes: list[Callable[[str], str]] = [str.upper, str.lower, str.casefold, str.swapcase]
    form: Literal["NFC", "NFD", "NFKC"] = draw(st.sampled_from(["NFC", "NFD", "NFKC"]))
    text = unicodedata.normalize(form, draw(st.sampled_from(changes))(text))
    return draw(spaces | st.just("")) + text


questions = spellings() | texts
answers = st.sampled_from(["down", "right", "Down", "雨"]) | texts
bare = st.none() | st.sampled_from(["up ?", "down ?"])
free_rows = st.fixed_dictionaries(
    {"Q": questions, "A": answers | st.lists(answers, min_size=1, max_size=3)},
    optional={"bare": bare, "options": st.none()},
)
choice_rows = st.fixed_dictionaries(
    {
        "Q": questions,
        "A": st.sampled_from(["red", "green", ["red", "green"]]),
        "options": st.permutations(["red", "green"]) | st.just(["red", "green", "blue"]),
    },
    optional={"bare": bare},
)
bad_rows: st.SearchStrategy[Any] = st.sampled_from(
    [3, None, "up", [], {}, {"Q": "up"}, {"A": "down"}, {"Q": " ", "A": "x"}, {"Q": "x", "A": []}]
) | st.fixed_dictionaries({"Q": questions, "A": st.sampled_from([None, "", "\t", {}, ["x", ""]])})
many_free = st.lists(free_rows | bad_rows, max_size=30).map(lambda rows: opposites(30) + rows)
many_choices = st.lists(choice_rows | bad_rows, max_size=30).map(lambda rows: choices(30) + rows)
many = many_free | many_choices
caps = st.sampled_from([LARGE, CAPPED])
checked = settings(deadline=None, max_examples=100)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ingest") / "raw.jsonl"


def _ingest(file: Path, rows: list[Any], splits: Splits = LARGE) -> Ingested:
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return ingest(file, "task", keys="auto", on_bad_row="skip", splits=splits, limit=None)


def _folded(question: str) -> str:
    return " ".join(unicodedata.normalize("NFC", question).split())


def _share(folded: str) -> float:
    return int(hashlib.sha256(folded.encode()).hexdigest()[:16], 16) / 16**16


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_good(row: Any) -> bool:
    if not isinstance(row, dict) or not row.keys() >= {"Q", "A"}:
        return False
    given_texts = [row["Q"], *_list(row["A"])]
    is_text = all(isinstance(text, str) and text.strip() for text in given_texts)
    return is_text and len(given_texts) > 1


def _reference(rows: list[Any], splits: Splits) -> tuple[dict[Split, list[Example]], int, int]:
    """Return the examples, how many distinct questions were found and how many rows skipped."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in filter(_is_good, rows):
        groups.setdefault(_folded(row["Q"]), []).append(row)
    for folded, group in list(groups.items()):
        told = {
            (frozenset(_list(row["A"])), frozenset(row["options"]))
            for row in group
            if row.get("options")
        }
        if len(told) > 1:
            del groups[folded]
    found: dict[Split, list[Example]] = {split: [] for split in SPLITS}
    for folded in sorted(groups, key=_share):
        group = groups[folded]
        share = _share(folded)
        split: Split = "train" if share < 0.5 else "validation" if share < 0.75 else "test"
        found[split].append(
            Example(
                id=hashlib.sha256(f"task\0{folded}".encode()).hexdigest(),
                task="task",
                question=min(row["Q"] for row in group),
                answers=tuple(sorted({text for row in group for text in _list(row["A"])})),
                options=min(
                    (tuple(row["options"]) for row in group if row.get("options")), default=None
                ),
                bare=min((row["bare"] for row in group if row.get("bare")), default=None),
            )
        )
    sizes = (splits.train, splits.validation, splits.test)
    kept = {split: found[split][:size] for split, size in zip(SPLITS, sizes, strict=True)}
    num_used = sum(len(group) for group in groups.values())
    return kept, len(groups), len(rows) - num_used


@checked
@given(rows=many, splits=caps)
def test_streaming_gives_what_holding_everything_gives(
    file: Path, rows: list[Any], splits: Splits
) -> None:
    ingested = _ingest(file, rows, splits)
    examples, num_distinct, num_skipped = _reference(rows, splits)
    assert ingested.examples == examples
    assert ingested.findings.distinct == num_distinct
    assert ingested.findings.skipped == num_skipped


@checked
@given(rows=many, splits=caps)
def test_counts_add_up_and_no_split_is_above_its_cap(
    file: Path, rows: list[Any], splits: Splits
) -> None:
    ingested = _ingest(file, rows, splits)
    findings = ingested.findings
    assert findings.read == len(rows) == findings.distinct + findings.merged + findings.skipped
    assert findings.distinct == sum(size.found for size in findings.splits.values())
    assert len(findings.problems) == findings.skipped
    for split in SPLITS:
        size = findings.splits[split]
        assert len(ingested.examples[split]) == size.kept == min(size.found, getattr(splits, split))


@checked
@given(rows=many, splits=caps)
def test_no_question_is_in_two_splits_or_twice_in_one(
    file: Path, rows: list[Any], splits: Splits
) -> None:
    parts = _ingest(file, rows, splits).examples.values()
    folded = [_folded(example.question) for part in parts for example in part]
    assert len(set(folded)) == len(folded)
    ids = [example.id for part in parts for example in part]
    assert len(set(ids)) == len(ids)


@checked
@given(rows=many, splits=caps, data=st.data())
def test_shuffling_changes_neither_examples_nor_counts(
    file: Path, rows: list[Any], splits: Splits, data: st.DataObject
) -> None:
    first = _ingest(file, rows, splits)
    again = _ingest(file, data.draw(st.permutations(rows)), splits)
    assert again.examples == first.examples
    assert replace(again.findings, problems=()) == replace(first.findings, problems=())


@checked
@given(rows=many_free, more=st.lists(free_rows | bad_rows, max_size=30), data=st.data())
def test_adding_rows_anywhere_moves_no_old_row(
    file: Path, rows: list[Any], more: list[Any], data: st.DataObject
) -> None:
    old = _ingest(file, rows).examples
    place = data.draw(st.integers(0, len(rows)))
    new = _ingest(file, rows[:place] + more + rows[place:]).examples
    for split in SPLITS:
        assert {row.id for row in old[split]} <= {row.id for row in new[split]}


@checked
@given(rows=many_free, more=st.lists(free_rows, max_size=30))
def test_adding_rows_above_the_caps_moves_none_to_another_split(
    file: Path, rows: list[Any], more: list[Any]
) -> None:
    splits = [
        {
            row.id: split
            for split, part in _ingest(file, part, CAPPED).examples.items()
            for row in part
        }
        for part in (rows, rows + more)
    ]
    for row in splits[0].keys() & splits[1].keys():
        assert splits[0][row] == splits[1][row]


@checked
@given(rows=many, splits=caps)
def test_a_second_copy_of_every_row_is_merged_or_skipped(
    file: Path, rows: list[Any], splits: Splits
) -> None:
    once, twice = _ingest(file, rows, splits), _ingest(file, [*rows, *rows], splits)
    assert twice.examples == once.examples
    assert twice.findings.distinct == once.findings.distinct
    assert twice.findings.skipped == 2 * once.findings.skipped


@checked
@given(rows=many)
def test_ingesting_the_examples_again_gives_the_examples(file: Path, rows: list[Any]) -> None:
    examples = _ingest(file, rows).examples
    again = []
    for part in examples.values():
        for row in part:
            item: dict[str, object] = {"Q": row.question, "A": row.answers}
            item |= {"options": row.options} if row.options else {}
            again.append(item | ({"bare": row.bare} if row.bare else {}))
    assert _ingest(file, again).examples == examples


@checked
@given(rows=st.lists(free_rows | choice_rows | bad_rows | st.text(letters), max_size=20))
def test_any_rows_are_ingested_or_refused_in_one_line(file: Path, rows: list[Any]) -> None:
    message = ""
    try:
        assert _ingest(file, rows).findings.read == len(rows)
    except DataError as error:
        message = str(error)
    assert "\n" not in message


@checked
@given(content=st.binary(max_size=80) | st.text(st.sampled_from('[]{},":QA\\ \n1'), max_size=40))
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_any_bytes_are_validated_or_refused_in_one_line(
    file: Path, ending: str, content: bytes | str
) -> None:
    path = file.with_suffix(ending)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = ""
    try:
        validate(path, keys="auto", splits=LARGE, limit=None)
    except DlpLoraError as error:
        message = str(error)
    assert "\n" not in message


@settings(deadline=None, max_examples=500)
@given(question=st.text(st.characters(max_codepoint=127)))
def test_ascii_is_normalised_as_anything_else(question: str) -> None:
    assert normalise(question) == _folded(question)


@settings(deadline=None, max_examples=300)
@given(question=st.text(letters) | spellings())
def test_any_question_is_normalised_by_form_and_white_space(question: str) -> None:
    assert normalise(question) == _folded(question)
