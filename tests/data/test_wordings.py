"""Wordings: read or refused by name, drawn by hash, and kept apart by split."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlplora.data.limits import ItemLimit
from dlplora.data.wordings import apply_wordings, asked, check_distinct, read_wordings
from dlplora.errors import DataError, ParamsError
from dlplora.params.wordings import Wordings
from dlplora.records.examples import Example, example_id
from tests.tiny import chat_of, tiny_tokenizer

CHAT = chat_of(tiny_tokenizer())
LIMIT = ItemLimit(CHAT, 256, None)
GOOD: dict[str, Any] = {
    "train": ["{}", "say {} now"],
    "validation": ["then {}"],
    "test": ["left {}", "right {} ?"],
}


def examples_of(task: str, count: int = 40, *, bare: bool = True) -> list[Example]:
    return [
        Example(
            example_id(task, f"what is up {number} ?"),
            task,
            f"what is up {number} ?",
            ("down",),
            None,
            f"up {number}" if bare else None,
        )
        for number in range(count)
    ]


def test_each_split_has_its_own_wordings_of_the_bare_question() -> None:
    wordings = Wordings.model_validate(GOOD)
    for split in ("train", "validation", "test"):
        found = apply_wordings(wordings, examples_of("a"), split, limit=LIMIT)
        expected = [
            {template.replace("{}", f"up {number}") for template in GOOD[split]}
            for number in range(40)
        ]
        questions = [str(example.reworded) for example in found]
        assert all(text in texts for text, texts in zip(questions, expected, strict=True))
        used = {q.replace(f"up {n}", "{}") for n, q in enumerate(questions)}
        assert used == set(GOOD[split])
        assert [replace(example, reworded=None) for example in found] == examples_of("a")


def test_without_a_bare_question_the_question_itself_is_worded() -> None:
    wordings = Wordings(train=["say {}"], validation=[], test=[])
    (found,) = apply_wordings(wordings, examples_of("a", 1, bare=False), "train", limit=LIMIT)
    assert found.reworded == "say what is up 0 ?"


def test_without_wordings_examples_stay_as_they_are() -> None:
    wordings = Wordings(train=["say {}"], validation=[], test=[])
    assert apply_wordings(wordings, examples_of("a"), "test", limit=LIMIT) == examples_of("a")


def test_an_item_that_would_be_too_long_stays_without() -> None:
    (example,) = examples_of("a", 1)
    wordings = Wordings(train=["say " * 20 + "{}"], validation=[], test=[])
    size = len(CHAT.prompt("say " * 20 + "up 0")) + len(CHAT.answer("down")) + 1
    for limit, is_reworded in ((size, True), (size - 1, False)):
        (found,) = apply_wordings(wordings, [example], "train", limit=ItemLimit(CHAT, limit, None))
        assert (found.reworded is not None) == is_reworded


def test_a_new_wording_moves_only_what_it_takes() -> None:
    before = Wordings(train=["say {}", "now {}", "left {}"], validation=[], test=[])
    after = Wordings(train=["{} down", *before.train], validation=[], test=[])
    old, new = (
        apply_wordings(one, examples_of("a", 200), "train", limit=LIMIT) for one in (before, after)
    )
    moved = [b for a, b in zip(old, new, strict=True) if a.reworded != b.reworded]
    assert 20 < len(moved) < 90  # of about 50
    assert all(str(example.reworded).endswith(" down") for example in moved)


@pytest.mark.parametrize(("share", "least", "most"), [(0, 0, 0), (0.5, 160, 240), (1, 400, 400)])
def test_a_share_of_the_examples_is_asked_otherwise(share: float, least: int, most: int) -> None:
    wordings = Wordings(train=["say {}"], validation=[], test=[])
    examples = apply_wordings(wordings, examples_of("a", 400), "train", limit=LIMIT)
    found = asked(examples, share=share)
    changed = [place for place, (a, b) in enumerate(zip(examples, found, strict=True)) if a != b]
    assert least <= len(changed) <= most
    assert all(found[place].question == examples[place].reworded for place in changed)
    assert asked(examples[7:50], share=share) == found[7:50]
    assert asked(examples_of("a"), share=share) == examples_of("a")  # that have no wording


def test_what_two_tasks_would_be_asked_alike_is_refused_by_name() -> None:
    wordings = Wordings(train=["{}"], validation=[], test=[])
    one, two = (
        apply_wordings(wordings, examples_of(task, 3), "train", limit=LIMIT) for task in "ab"
    )
    with pytest.raises(DataError, match=r"the wordings of b make the question 'up 0', which a has"):
        check_distinct({"a": one, "b": two})
    plain = [replace(example, question=str(example.bare), reworded=None) for example in two]
    with pytest.raises(DataError, match=r"the wordings of a make the question 'up 0', which b has"):
        check_distinct({"a": one, "b": plain})
    check_distinct({"a": one})
    check_distinct({"a": examples_of("a"), "b": examples_of("b")})  # no wording's doing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ["say up"]}, "train.0: expected one {} for the question, not 0; found 'say up'"),
        ({"test": ["{} or {}"]}, "test.0: expected one {} for the question, not 2; found '{} or {"),
        ({"test": ["say {}  now"]}, "'say {} now' stands twice; each wording is of one split"),
        ({"validation": None}, "validation: Input should be a valid list; found None"),
        ({"train": [7]}, "train.0: Input should be a valid string; found 7"),
        ({"more": []}, "more: Extra inputs are not permitted"),
    ],
)
def test_wrong_wordings_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(GOOD | changes))
    with pytest.raises(ParamsError) as caught:
        read_wordings(file)
    told = str(caught.value)
    assert told.startswith(f"{file}: ")
    assert message in told
    assert "\n" not in told


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"mine\.yaml: not there; expected a file of wordings"):
        read_wordings(tmp_path / "mine.yaml")
