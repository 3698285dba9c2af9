"""Ingest: what is refused and with which words, what is united, and how splits are dealt."""

import hashlib
import json
import random
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlplora.data.ingest import Ingested, ingest, validate
from dlplora.data.raw import raw_files
from dlplora.errors import DataError
from dlplora.params.inputs import Keys, Splits
from dlplora.records.examples import SPLITS, Example, example_id
from tests.tiny import choices, opposites, write_raw

SHARES = (0.75, 0.10, 0.15)
SMALL = Splits(train=400, validation=50, test=60, shares=SHARES, least=(1, 1, 1))
USUAL = Splits(train=400, validation=50, test=60, shares=SHARES, least=(16, 4, 8))
TIGHT = Splits(train=12, validation=3, test=4, shares=SHARES, least=(1, 1, 1))


def _ingest(
    file: Path,
    *,
    keys: Literal["auto"] | Keys = "auto",
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    splits: Splits = SMALL,
) -> Ingested:
    return ingest(file, "task", keys=keys, on_bad_row=on_bad_row, splits=splits, limit=None)


def _of_items(file: Path, items: list[Any], **options: Any) -> Ingested:
    write_raw(file, items)
    return _ingest(file, **options)


def _error(file: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        _ingest(file, **options)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert "\n" not in message
    return message.removeprefix(f"{file}: ")


def _all(ingested: Ingested) -> dict[str, Example]:
    """Return every kept example by its question."""
    return {row.question: row for part in ingested.examples.values() for row in part}


def _split_of(ingested: Ingested) -> dict[str, str]:
    return {row.id: split for split, part in ingested.examples.items() for row in part}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "raw.json"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"Q,A\nup,down\n", "not JSON: it begins with b'Q'"),
        (b'[{"Q": "up", "A": "down"}', "not JSON: item 2, at its byte 25: unexpected character"),
        (b'[{"Q": "up", "A": "down"},]', "not JSON: item 2, at its byte 1: "),
        (b'[{"Q": "up", "A": "down"}] x', "not JSON: item 2, at its byte 1: unexpected character"),
        (b'[{"Q": "up", "A": "down"}, {"Q" 3}]', "not JSON: item 2, at its byte 6: "),
        (
            b'{"Q": "up", "A": "down"}\n{"Q": "hot", "A": "cold"}\n',
            'found an object, expected a list of {"Q": …, "A": …}; name a file of one object '
            "a line .jsonl",
        ),
        (b'[{"Q": "\xff", "A": "down"}]', "not JSON: item 1, at its byte 8: invalid UTF-8"),
        (b'[{"Q": "\0", "A": "down"}]', "not JSON: item 1, at its byte 8: unexpected control"),
        ('[{"Q": "up", "A": "down"}]'.encode("utf-16"), "looks like UTF-16"),
        ('[{"Q": "up", "A": "down"}]'.encode("utf-16-be"), "looks like UTF-16"),
        ('[{"Q": "up", "A": "down"}]'.encode("utf-32"), "looks like UTF-16 or UTF-32"),
        (b'[{"Q": "\\ud800", "A": "down"}]', "not JSON: item 1, at its byte 14: no low surrogate"),
        (b'[{"Q": "\\udc00", "A": "down"}]', "not JSON: item 1, at its byte "),
        (b'[{"Q": "up", "A": NaN}]', "item 1 is not JSON: "),
        (b"[" * 100_000 + b"]" * 100_000, "item 1 is not JSON: "),
        (b'{"data": []}', 'found an object, expected a list of {"Q": …, "A": …}'),
        (b'"up"', "found a string, expected a list"),
        (b"3", "found a number, expected a list"),
        (b"true", "found a truth value, expected a list"),
        (b"null", "found null, expected a list"),
    ],
)
def test_a_file_that_is_no_json_list_is_named(file: Path, content: bytes, expected: str) -> None:
    file.write_bytes(content)
    assert _error(file).startswith(expected)


def test_an_empty_list_is_refused(file: Path) -> None:
    write_raw(file, [])
    assert _error(file) == "holds no items"
    keys = Keys(question="Q", answer="A", options=None, context=[])
    assert _error(file, keys=keys) == "holds no items"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert _error(tmp_path / "absent.json") == "No such file or directory"


def test_a_task_folder_stands_for_its_files(tmp_path: Path) -> None:
    write_raw(tmp_path / "task/any.json", opposites(40))
    (tmp_path / "task/notes.txt").write_text("where it came from")
    assert raw_files(tmp_path / "task") == [tmp_path / "task/any.json"]
    from_folder, from_file = (_ingest(tmp_path / path) for path in ("task", "task/any.json"))
    assert from_folder.examples == from_file.examples


def test_a_task_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("where it came from")
    assert _error(tmp_path) == (
        "found no file of questions and answers, expected at least one: "
        ".csv, .json, .jsonl, .ndjson, .parquet, .tsv"
    )


def test_a_byte_order_mark_changes_nothing(file: Path) -> None:
    plain = _of_items(file, opposites(40))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert _ingest(file) == plain


@pytest.mark.parametrize(
    ("question", "answer", "options"),
    [
        ("Q", "A", "options"),
        ("q", "a", "OPTIONS"),
        ("question", "answer", "options"),
        ("QUESTION", "Answer", "Options"),
        ("input", "output", "options"),
        ("Input", "OUTPUT", "options"),
    ],
)
def test_known_keys_are_found_in_any_case(
    file: Path, question: str, answer: str, options: str
) -> None:
    expected = _of_items(file, choices(40))
    renamed = [
        {"note": 1, answer: item["A"], options: item["options"], question: item["Q"]}
        for item in choices(40)
    ]
    ingested = _of_items(file, renamed)
    assert ingested.examples == expected.examples
    keys = {"question": question, "answer": answer, "options": options}
    assert ingested.findings.keys == keys


def test_named_keys_are_used_also_beside_known_ones(file: Path) -> None:
    items = [
        {"prompt": item["Q"], "gold": item["A"], "given": item["options"], "Q": "x", "A": 3}
        for item in choices(40)
    ]
    expected = _of_items(file, choices(40))
    keys = Keys(question="prompt", answer="gold", options="given", context=[])
    ingested = _of_items(file, items, keys=keys)
    assert ingested.examples == expected.examples
    assert ingested.findings.keys == {"question": "prompt", "answer": "gold", "options": "given"}


def test_named_keys_without_options_make_free_answers(file: Path) -> None:
    keys = Keys(question="Q", answer="A", options=None, context=[])
    ingested = _of_items(file, choices(40), keys=keys)
    assert ingested.findings.kind == "qa"
    assert {row.options for row in _all(ingested).values()} == {None}
    assert ingested.findings.keys == {"question": "Q", "answer": "A"}


def test_named_keys_are_taken_letter_by_letter(file: Path) -> None:
    write_raw(file, opposites(40))
    keys = Keys(question="q", answer="A", options=None, context=[])
    assert _error(file, keys=keys).startswith("item 1 has no 'q' (keys: Q, A)")


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (("text", "label"), "text, label"),
        (("Q", "input", "A"), "Q, input, A"),
        (("Q", "A", "input", "output"), "Q, A, input, output"),
    ],
)
def test_keys_that_name_no_one_pair_are_listed_with_those_expected(
    file: Path, keys: tuple[str, ...], found: str
) -> None:
    write_raw(file, [dict.fromkeys(keys, "x")] * 3)
    assert _error(file) == (
        f"found the keys {found}; expected the same in all rows, one of Q/question/input/prompt "
        "and one of A/answer/answers/output/completion/response, with "
        "instruction/title/context/passage in front, or names by --keys (in params.yaml: "
        "tasks.<task>.keys)"
    )


def test_a_list_without_objects_is_refused(file: Path) -> None:
    write_raw(file, ["up", "down"])  # type: ignore[list-item]
    assert _error(file).startswith("item 1 is text, expected an object")


OPTIONS = ["red", "green"]
BAD_ITEMS: list[tuple[object, str]] = [
    ("up", "is text, expected an object"),
    (3, "is a number, expected an object"),
    (None, "is null, expected an object"),
    (["up", "down"], "is a list, expected an object"),
    (False, "is a truth value, expected an object"),
    ({}, "has no question and no answer (keys: none)"),
    ({"A": "down"}, "has no question (keys: A)"),
    ({"Q": "up", "Reply": "down"}, "has no answer (keys: Q, Reply)"),
    ({"Q": "", "A": "down"}, "has an empty 'Q'"),
    ({"Q": " \t\n", "A": "down"}, "has an empty 'Q'"),
    ({"Q": "up", "A": ""}, "has an empty 'A'"),
    ({"Q": "up", "A": []}, "has an empty list as 'A'"),
    ({"Q": "up", "A": ["down", " "]}, "has an empty 'A'"),
    ({"Q": None, "A": "down"}, "has null as 'Q', expected text"),
    ({"Q": ["up"], "A": "down"}, "has a list as 'Q', expected text"),
    ({"Q": "up", "A": None}, "has null as 'A', expected text"),
    ({"Q": "up", "A": {"text": "down"}}, "has an object as 'A', expected text"),
    ({"Q": "up", "A": ["down", ["x"]]}, "has a list as 'A', expected text"),
    ({"Q": "up\0", "A": "down"}, "has a NUL character in 'Q'"),
    ({"Q": "up", "A": ["down", "d\0"]}, "has a NUL character in 'A'"),
]
BAD_CHOICES: list[tuple[object, str]] = [
    (
        {"Q": "up", "A": "blue", "options": OPTIONS},
        "has the answer 'blue', which is not among its options",
    ),
    (
        {"Q": "up", "A": ["red", "Green"], "options": OPTIONS},
        "has the answer 'Green', which is not among its options",
    ),
    (
        {"Q": "up", "A": "red", "options": ["red", "red"]},
        "has the options ['red', 'red'], expected at least two, all different",
    ),
    (
        {"Q": "up", "A": "red", "options": ["red"]},
        "has the options ['red'], expected at least two, all different",
    ),
    (
        {"Q": "up", "A": "red", "options": "red"},
        "has the options ['red'], expected at least two, all different",
    ),
    ({"Q": "up", "A": "red", "options": []}, "has an empty list as 'options'"),
    ({"Q": "up", "A": "red", "options": ["red", ""]}, "has an empty 'options'"),
    ({"Q": "up", "A": "red", "options": {"red": 1}}, "has an object as 'options', expected text"),
    ({"Q": "up", "options": OPTIONS}, "has no answer (keys: Q, options)"),
]
BAD = [(bad, text, opposites) for bad, text in BAD_ITEMS]
BAD += [(bad, text, choices) for bad, text in BAD_CHOICES]


@pytest.mark.parametrize(("bad", "problem", "good"), BAD)
@pytest.mark.parametrize("number", [17, 41])
def test_a_bad_item_is_named_refused_or_skipped(
    file: Path, bad: object, problem: str, good: Any, number: int
) -> None:
    items = good(40)
    expected = _of_items(file, items)
    items.insert(number - 1, bad)
    write_raw(file, items)
    assert _error(file).startswith(f"item {number} {problem}")
    (found,) = validate(file, keys="auto", splits=SMALL, limit=None).problems
    assert found.item == number
    assert found.problem.startswith(problem)
    skipped = _ingest(file, on_bad_row="skip")
    assert skipped.examples == expected.examples
    assert skipped.findings == replace(expected.findings, read=41, skipped=1, problems=(found,))


@pytest.mark.parametrize("bad", [{"Q": "up"}, {"A": "down"}, {}])
def test_a_first_item_without_a_key_is_named_like_any_other(
    file: Path, bad: dict[str, object]
) -> None:
    write_raw(file, [bad, *opposites(40)])
    assert _error(file).startswith("item 1 has no ")
    assert [
        problem.item for problem in validate(file, keys="auto", splits=SMALL, limit=None).problems
    ] == [1]


def test_the_number_of_bad_items_is_told_and_all_are_listed(file: Path) -> None:
    items: list[Any] = opposites(40)
    for place in (4, 9, 30):
        items[place] = {"Q": "", "A": "x"}
    write_raw(file, items)
    assert _error(file) == (
        f"item 5 has an empty 'Q' (and 2 more: `dlplora validate {file}` lists them)"
    )
    assert [
        problem.item for problem in validate(file, keys="auto", splits=SMALL, limit=None).problems
    ] == [5, 10, 31]
    findings = _ingest(file, on_bad_row="skip").findings
    assert (findings.read, findings.distinct, findings.skipped) == (40, 37, 3)
    assert [problem.item for problem in findings.problems] == [5, 10, 31]


def test_a_file_of_good_items_has_no_problems(file: Path) -> None:
    write_raw(file, [*opposites(40), *opposites(10)])
    assert validate(file, keys="auto", splits=SMALL, limit=None).problems == ()


def test_every_skipped_item_is_counted_though_only_some_are_named(file: Path) -> None:
    items = [*opposites(40), *({"Q": f"x {place}", "A": ""} for place in range(150))]
    findings = _of_items(file, items, on_bad_row="skip").findings
    assert findings.skipped == 150
    assert findings.problems[0].item == 41
    assert 1 <= len(findings.problems) <= 150


def test_an_item_may_list_several_answers(file: Path) -> None:
    items = [*opposites(40), {"Q": "which way?", "A": ["up", "left", "up"]}]
    ingested = _of_items(file, items)
    assert _all(ingested)["which way?"].answers == ("left", "up")
    assert ingested.findings.most_answers == 2


def test_an_item_may_have_several_right_options(file: Path) -> None:
    items = [*choices(40), {"Q": "which?", "A": ["red", "blue"], "options": ["red", "x", "blue"]}]
    row = _all(_of_items(file, items))["which?"]
    assert row.answers == ("blue", "red")
    assert row.options == ("red", "x", "blue")
    assert row.kind == "mcq"


def test_the_bare_question_is_kept(file: Path) -> None:
    items = [*opposites(40), {"Q": "Q: up ? A:", "bare": "up ?", "A": "down"}]
    rows = _all(_of_items(file, items))
    assert rows["Q: up ? A:"].bare == "up ?"
    assert Counter(row.bare for row in rows.values()) == {None: 40, "up ?": 1}


def test_free_answers_of_one_question_are_merged(file: Path) -> None:
    again = [
        {"Q": "which way  ?", "A": "up"},
        {"Q": " which way ?", "A": ["left", "up"]},
        {"Q": "which\tway ?", "A": "right"},
    ]
    ingested = _of_items(file, [*opposites(40), *again])
    (row,) = [row for row in _all(ingested).values() if row.id == example_id("task", "which way ?")]
    assert row.answers == ("left", "right", "up")
    assert row.question in {item["Q"] for item in again}
    findings = ingested.findings
    assert (findings.read, findings.distinct, findings.merged) == (43, 41, 2)
    assert findings.skipped == 0


def test_the_same_choice_again_in_another_order_is_merged(file: Path) -> None:
    again = [
        {"Q": "which?", "A": "red", "options": ["red", "green"]},
        {"Q": " which? ", "A": ["red"], "options": ["green", "red"]},
    ]
    ingested = _of_items(file, [*choices(40), *again])
    (row,) = [row for row in _all(ingested).values() if row.id == example_id("task", "which?")]
    assert set(row.options or ()) == {"red", "green"}
    assert (ingested.findings.distinct, ingested.findings.merged) == (41, 1)


@pytest.mark.parametrize(
    "other",
    [
        {"Q": "which? ", "A": "green", "options": ["red", "green"]},
        {"Q": "which?", "A": ["red", "green"], "options": ["red", "green"]},
        {"Q": "which?", "A": "red", "options": ["red", "green", "blue"]},
        {"Q": "which?", "A": "red"},
    ],
)
def test_choices_that_contradict_each_other_are_both_bad(
    file: Path, other: dict[str, object]
) -> None:
    items = choices(40)
    expected = _of_items(file, items)
    items.insert(3, {"Q": "which?", "A": "red", "options": ["red", "green"]})
    items.insert(30, other)
    write_raw(file, items)
    assert _error(file).startswith(
        "item 4 contradicts item 31: same question, other answers (and 1 more"
    )
    found = [
        (problem.item, problem.problem)
        for problem in validate(file, keys="auto", splits=SMALL, limit=None).problems
    ]
    assert found == [
        (4, "contradicts item 31: same question, other answers"),
        (31, "contradicts item 4: same question, other answers"),
    ]
    skipped = _ingest(file, on_bad_row="skip")
    assert skipped.examples == expected.examples
    assert (skipped.findings.read, skipped.findings.skipped) == (42, 2)


def test_a_contradiction_names_an_item_that_does_differ(file: Path) -> None:
    items = choices(40)
    for answer in ("red", "red", "green"):
        items.append({"Q": "which?", "A": answer, "options": ["red", "green"]})
    write_raw(file, items)
    named = {
        problem.item: int(problem.problem.split("item ")[1].split(":")[0])
        for problem in validate(file, keys="auto", splits=SMALL, limit=None).problems
    }
    assert named[41] == 43
    assert named[42] == 43
    assert named[43] in {41, 42}


@pytest.mark.parametrize("qa_first", [False, True])
@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
def test_a_task_is_either_multiple_choice_or_free_answers(
    file: Path, qa_first: bool, on_bad_row: str
) -> None:
    parts = [choices(20), opposites(20)]
    write_raw(file, [*parts[qa_first], *parts[not qa_first]])
    mcq, qa = (21, 1) if qa_first else (1, 21)
    expected = f"item {mcq} has options and item {qa} has none; "
    assert _error(file, on_bad_row=on_bad_row).startswith(expected)


def test_null_options_are_no_options(file: Path) -> None:
    items = [item | {"options": None} for item in opposites(40)]
    assert _of_items(file, items).examples == _of_items(file, opposites(40)).examples


def _place(question: str) -> float:
    """Return the first 8 bytes of the SHA-256 of the folded question as a fraction."""
    folded = " ".join(unicodedata.normalize("NFC", question).split())
    return int(hashlib.sha256(folded.encode()).hexdigest()[:16], 16) / 16**16


def test_a_question_falls_by_its_hash_and_the_shares(file: Path) -> None:
    ingested = _of_items(file, opposites(300))
    for split, low, high in zip(SPLITS, (0, 0.75, 0.85), (0.75, 0.85, 1), strict=True):
        questions = [row.question for row in ingested.examples[split]]
        expected = [item["Q"] for item in opposites(300) if low <= _place(str(item["Q"])) < high]
        assert questions == sorted(expected, key=lambda text: _place(str(text)))


def test_the_share_of_a_split_is_about_its_size(file: Path) -> None:
    splits = Splits(train=9999, validation=9999, test=9999, shares=SHARES, least=(1, 1, 1))
    ingested = _of_items(file, opposites(2000), splits=splits)
    for split, share in zip(SPLITS, SHARES, strict=True):
        deviation = (share * (1 - share) / 2000) ** 0.5
        assert abs(len(ingested.examples[split]) / 2000 - share) < 4 * deviation


def test_a_split_above_its_cap_keeps_the_first_in_hash_order(file: Path) -> None:
    whole = _of_items(file, opposites(300))
    capped = _ingest(file, splits=TIGHT)
    for split, cap in zip(SPLITS, (12, 3, 4), strict=True):
        assert capped.examples[split] == whole.examples[split][:cap]
        size = capped.findings.splits[split]
        assert (size.found, size.kept) == (len(whole.examples[split]), cap)


def test_the_splits_of_two_tasks_agree_on_a_question(file: Path) -> None:
    write_raw(file, opposites(100))
    first, second = (
        ingest(file, task, keys="auto", on_bad_row="refuse", splits=SMALL, limit=None)
        for task in "ab"
    )
    for split in SPLITS:
        questions = [[row.question for row in part.examples[split]] for part in (first, second)]
        assert questions[0] == questions[1]
    assert not _split_of(first).keys() & _split_of(second).keys()


@pytest.mark.parametrize(
    ("least", "split"), [((30, 1, 1), "train"), ((1, 9, 1), "validation"), ((1, 1, 9), "test")]
)
def test_too_few_items_for_a_split_are_refused_with_the_numbers(
    file: Path, least: tuple[int, int, int], split: str
) -> None:
    usual = _of_items(file, opposites(19))
    splits = Splits(train=400, validation=50, test=60, shares=SHARES, least=least)
    found = len(usual.examples[split])
    assert found < max(least), "the items of the test must be too few"
    assert _error(file, splits=splits) == (
        f"{found} of 19 distinct questions fell into the {split} split, at least {max(least)} are "
        "needed; add items or lower splits.least"
    )


def test_too_few_items_are_counted_without_repetitions_and_bad_rows(file: Path) -> None:
    items: list[Any] = [*opposites(10) * 20, *[{"Q": "", "A": ""}] * 200]
    write_raw(file, items)
    assert "of 10 distinct questions" in _error(file, splits=USUAL, on_bad_row="skip")


def test_only_bad_rows_are_too_few(file: Path) -> None:
    write_raw(file, [{"Q": "", "A": "x"}] * 40)
    assert _error(file, on_bad_row="skip") == (
        "all 40 rows are bad, the first: item 1 has an empty 'Q'"
    )


def test_enough_items_are_accepted(file: Path) -> None:
    findings = _of_items(file, opposites(120), splits=USUAL).findings
    assert (findings.task, findings.files, findings.kind) == ("task", (str(file),), "qa")
    assert findings.longest_question_chars == max(len(str(row["Q"])) for row in opposites(120))
    assert findings.longest_answer_chars == len("right")
    assert findings.most_answers == 1


questions = st.sampled_from(
    ["up ?", "UP ?", " up\t?", "left ?", "Left  ?", "hot ?", "which way ?", "one", "two", "ONE"]
) | st.text("abAB é\u00a0", min_size=1, max_size=4)
answers = st.sampled_from(["down", "right", "cold", " "])
free_items = st.fixed_dictionaries(
    {"Q": questions, "A": answers | st.lists(answers, max_size=3) | st.just({})}
) | st.fixed_dictionaries({"Q": questions})
choice_items = st.fixed_dictionaries(
    {
        "Q": questions,
        "A": st.sampled_from(["red", "green", "blue"]),
        "options": st.permutations(["red", "green"]) | st.permutations(["red", "green", "blue"]),
    }
)
many_free = st.lists(free_items, max_size=12).map(lambda items: [*opposites(40), *items])
many_choices = st.lists(choice_items, max_size=12).map(lambda items: [*choices(40), *items])
many = many_free | many_choices


@pytest.fixture(scope="module")
def same_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ingest") / "raw.json"


def _folded(item: dict[str, Any]) -> str:
    return " ".join(unicodedata.normalize("NFC", item["Q"]).split())


def _is_good(item: dict[str, Any]) -> bool:
    """Tell by the plainest rules whether an item can be used on its own."""
    answers = item.get("A") if isinstance(item.get("A"), list) else [item.get("A")]
    texts = [item["Q"], *answers]
    fits = all(answer in item.get("options", answers) for answer in answers)
    return bool(answers) and all(isinstance(t, str) and t.strip() for t in texts) and fits


@settings(max_examples=60, deadline=None)
@given(items=many)
def test_the_counts_of_the_findings_add_up(same_file: Path, items: list[dict[str, Any]]) -> None:
    ingested = _of_items(same_file, items, on_bad_row="skip")
    findings = ingested.findings
    assert findings.read == len(items)
    assert findings.read == findings.distinct + findings.merged + findings.skipped
    assert findings.distinct == sum(size.found for size in findings.splits.values())
    kept = {split: len(part) for split, part in ingested.examples.items()}
    assert kept == {split: size.kept for split, size in findings.splits.items()}


@settings(max_examples=60, deadline=None)
@given(items=many_free)
def test_each_question_of_good_items_comes_once_with_all_its_answers(
    same_file: Path, items: list[dict[str, Any]]
) -> None:
    expected: dict[str, set[str]] = {}
    for item in filter(_is_good, items):
        given_answers = item["A"] if isinstance(item["A"], list) else [item["A"]]
        expected.setdefault(_folded(item), set()).update(given_answers)
    ingested = _of_items(same_file, items, on_bad_row="skip")
    rows = [row for part in ingested.examples.values() for row in part]
    assert {_folded({"Q": row.question}): set(row.answers) for row in rows} == expected
    assert len(rows) == len(expected)
    assert ingested.findings.skipped == len(items) - len(list(filter(_is_good, items)))


@settings(max_examples=60, deadline=None)
@given(items=many_choices)
def test_each_choice_that_nothing_contradicts_comes_once(
    same_file: Path, items: list[dict[str, Any]]
) -> None:
    seen: dict[str, set[tuple[str, frozenset[str]]]] = {}
    for item in filter(_is_good, items):
        seen.setdefault(_folded(item), set()).add((item["A"], frozenset(item["options"])))
    expected = {question for question, kinds in seen.items() if len(kinds) == 1}
    ingested = _of_items(same_file, items, on_bad_row="skip")
    rows = [row for part in ingested.examples.values() for row in part]
    assert sorted(_folded({"Q": row.question}) for row in rows) == sorted(expected)


@settings(max_examples=60, deadline=None)
@given(items=many)
def test_no_question_is_in_two_splits(same_file: Path, items: list[dict[str, Any]]) -> None:
    ingested = _of_items(same_file, items, on_bad_row="skip")
    folded = [
        {_folded({"Q": row.question}) for row in ingested.examples[split]} for split in SPLITS
    ]
    assert sum(map(len, folded)) == len(set().union(*folded))
    assert sum(map(len, folded)) == ingested.findings.distinct


@settings(max_examples=60, deadline=None)
@given(items=many, seed=st.integers(0, 2**32))
def test_the_order_of_the_items_changes_nothing(
    same_file: Path, items: list[dict[str, Any]], seed: int
) -> None:
    first = _of_items(same_file, items, on_bad_row="skip")
    for order in (items[::-1], random.Random(seed).sample(items, len(items))):
        again = _of_items(same_file, order, on_bad_row="skip")
        assert again.examples == first.examples
        assert replace(again.findings, problems=()) == replace(first.findings, problems=())


@settings(max_examples=60, deadline=None)
@given(
    items=many_free, more=st.lists(free_items, max_size=30), splits=st.sampled_from([SMALL, TIGHT])
)
def test_adding_rows_moves_no_old_row_to_another_split(
    same_file: Path, items: list[dict[str, Any]], more: list[dict[str, Any]], splits: Splits
) -> None:
    old = _split_of(_of_items(same_file, items, on_bad_row="skip", splits=splits))
    grown = _of_items(same_file, [*items, *more], on_bad_row="skip", splits=splits)
    new = _split_of(grown)
    assert {row: new[row] for row in old if row in new} == {r: old[r] for r in old if r in new}
    if splits is SMALL:  # below the caps nothing leaves
        assert old.keys() <= new.keys()


def test_the_file_itself_is_never_changed(file: Path) -> None:
    write_raw(file, [*opposites(40), {"Q": "", "A": ""}])
    before = file.read_bytes()
    _ingest(file, on_bad_row="skip")
    assert file.read_bytes() == before
    assert json.loads(before)[0] == opposites(1)[0]
    assert list(file.parent.iterdir()) == [file]
