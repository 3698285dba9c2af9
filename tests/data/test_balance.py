"""Balance: equal shares of every task."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlplora.data.balance import (
    RouterData,
    balance,
    draw,
    read_labelled,
    write_router_data,
)
from dlplora.errors import DataError
from dlplora.params.routing import Balance
from dlplora.records.examples import Example, example_id

SIZES = {"up": 7, "hot": 30, "big": 1, "left": 13}
PARAMS = Balance(per_task=20, validation_per_task=5, reworded=0.0)


def _examples(task: str, size: int, part: str) -> list[Example]:
    return [
        Example(example_id(task, question), task, question, (f"{task} a{row}", "z"), None, None)
        for row in range(size)
        for question in [f"\n{part} {task} q{row} ? "]
    ]


TRAIN = {task: _examples(task, size, "train") for task, size in SIZES.items()}
VALIDATION = {task: _examples(task, 1 + size // 3, "check") for task, size in SIZES.items()}


def _balance(params: Balance = PARAMS, *, seed: int = 0, tasks: Sequence[str] = ()) -> RouterData:
    names = tasks or list(TRAIN)
    train, validation = ({task: part[task] for task in names} for part in (TRAIN, VALIDATION))
    return balance(train, validation, params=params, seed=seed)


@given(size=st.integers(1, 40), count=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_drawing_covers_every_row_before_repeating_any(size: int, count: int, seed: int) -> None:
    rows = draw(size, count, np.random.default_rng(seed))
    assert len(rows) == count
    for start in range(0, count, size):
        part = rows[start : start + size]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(size))
    assert max(Counter(rows).values()) == -(-count // size)


def test_the_order_of_drawing_changes_from_pass_to_pass_and_seed_to_seed() -> None:
    rows = draw(30, 60, np.random.default_rng(0))
    assert rows[:30] != rows[30:]
    assert rows[:30] != list(range(30))
    assert rows != draw(30, 60, np.random.default_rng(1))


def test_every_task_contributes_the_same_number_of_texts() -> None:
    data = _balance()
    assert Counter(row.task for row in data.train) == dict.fromkeys(SIZES, 20)
    assert Counter(row.task for row in data.validation) == dict.fromkeys(SIZES, 5)


def test_every_text_is_a_question_of_its_task_and_split() -> None:
    data = _balance()
    for rows, examples in ((data.train, TRAIN), (data.validation, VALIDATION)):
        for row in rows:
            assert row.text in {example.question for example in examples[row.task]}


def test_small_tasks_repeat_evenly_and_large_ones_not_at_all() -> None:
    counts = Counter(row.text for row in _balance().train)
    assert counts["\ntrain big q0 ? "] == 20
    assert {count for text, count in counts.items() if " up " in text} == {2, 3}
    assert {count for text, count in counts.items() if " hot " in text} == {1}


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data() -> None:
    first, second, other = _balance(seed=3), _balance(seed=3), _balance(seed=4)
    assert first == second
    assert first.train != other.train
    assert first.validation != other.validation


@settings(deadline=None)
@given(
    sizes=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=1),
    per_task=st.integers(1, 40),
    per_validation=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_any_tasks_get_equal_shares_without_needless_repetition(
    sizes: dict[str, int], per_task: int, per_validation: int, seed: int
) -> None:
    train = {task: _examples(task, size, "train") for task, size in sizes.items()}
    validation = {task: _examples(task, 31 - size, "check") for task, size in sizes.items()}
    params = Balance(
        per_task=per_task,
        validation_per_task=per_validation,
        reworded=0.0,
    )
    data = balance(train, validation, params=params, seed=seed)
    assert data == balance(train, validation, params=params, seed=seed)
    drawn = ((data.train, train, per_task), (data.validation, validation, per_validation))
    for rows, examples, count in drawn:
        assert Counter(row.task for row in rows) == dict.fromkeys(sizes, count)
        for task, part in examples.items():
            counts = Counter(row.text for row in rows if row.task == task)
            assert counts.keys() <= {example.question for example in part}
            assert len(counts) == min(count, len(part))
            assert max(counts.values()) - min(counts.values()) <= 1


def test_the_order_of_the_tasks_changes_nothing() -> None:
    assert _balance(tasks=list(TRAIN)[::-1]) == _balance()
    assert _balance(tasks=sorted(TRAIN)) == _balance()


def test_router_data_comes_back_from_its_folder(tmp_path: Path) -> None:
    data = _balance()
    write_router_data(tmp_path / "data", data)
    assert read_back(tmp_path / "data") == data


def test_the_same_router_data_gives_the_same_bytes_in_place_of_the_old(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b/old.parquet").write_text("old")
    for name in ("a", "b"):
        write_router_data(tmp_path / name, _balance())
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("a", "b")]
    assert names[0] == names[1]
    for name in names[0]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def read_back(folder: Path) -> RouterData:
    return RouterData(
        read_labelled(folder / "train.parquet"),
        read_labelled(folder / "validation.parquet"),
    )


def test_a_share_of_the_texts_is_worded_otherwise_and_contradictions_are_refused() -> None:
    worded = {
        task: [replace(row, reworded=f"now {row.question.strip()}") for row in own]
        for task, own in TRAIN.items()
    }
    params = PARAMS.model_copy(update={"reworded": 1.0})
    found = balance(worded, VALIDATION, params=params, seed=0)
    assert all(row.text.startswith("now ") for row in found.train)
    assert found.validation == balance(TRAIN, VALIDATION, params=PARAMS, seed=0).validation
    same = {task: [replace(row, reworded="up ?") for row in own] for task, own in TRAIN.items()}
    with pytest.raises(DataError, match=r"make the question 'up \?', which big has, too"):
        balance(same, VALIDATION, params=params, seed=0)
