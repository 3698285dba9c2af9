"""Padding and the order of batches."""

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from dlplora.data.batches import (
    batch_order,
    common_prefix,
    pad_left,
    pad_right,
    prefix_groups,
)

ROWS = [[5, 6, 7], [8], [9, 10]]


def test_left_padding_ends_every_row_in_the_last_column() -> None:
    padded = pad_left(ROWS, 0)
    assert padded.ids_BS.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 10]]
    assert padded.mask_BS.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert padded.positions_BS.tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 1]]


def test_right_padding_begins_every_row_in_the_first_column() -> None:
    padded = pad_right(ROWS, 0)
    assert padded.ids_BS.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert padded.mask_BS.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert padded.positions_BS.tolist() == [[0, 1, 2]] * 3


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 9))
def test_an_epoch_holds_no_row_twice_and_leaves_out_less_than_a_batch(
    lengths: list[int], size: int, seed: int
) -> None:
    size = min(size, len(lengths))
    num_batches = len(lengths) // size
    stream = batch_order(lengths, size, seed=seed)
    for _ in range(3):
        drawn = [row for batch in islice(stream, num_batches) for row in batch]
        assert len(set(drawn)) == len(drawn) == num_batches * size


def test_no_row_is_left_out_for_ever() -> None:
    drawn = [row for batch in islice(batch_order([1] * 24, 16, seed=0), 30) for row in batch]
    assert set(drawn) == set(range(24))


def test_fewer_rows_than_places_make_one_batch() -> None:
    assert sorted(next(batch_order([3, 1, 2], 8, seed=0))) == [0, 1, 2]


def test_rows_of_equal_length_are_mixed_whatever_their_order() -> None:
    batches = list(islice(batch_order([1] * 512, 32, seed=0), 16))
    assert all(max(batch) - min(batch) > 256 for batch in batches)


def test_batches_hold_like_lengths_and_repeat_by_their_seed() -> None:
    lengths = list(range(64))
    first = list(islice(batch_order(lengths, 8, seed=3), 8))
    assert first == list(islice(batch_order(lengths, 8, seed=3), 8))
    assert first != list(islice(batch_order(lengths, 8, seed=4), 8))
    assert all(max(batch) - min(batch) == 7 for batch in first)


def test_batches_hold_rows_of_one_group() -> None:
    groups = [number % 2 for number in range(64)]
    batches = list(islice(batch_order([1] * 64, 8, seed=3, groups=groups), 8))
    assert all(len({groups[row] for row in batch}) == 1 for batch in batches)
    assert sorted(row for batch in batches for row in batch) == list(range(64))


def test_groups_are_rows_of_one_long_beginning() -> None:
    first, second = list(range(30)), list(range(5)) + list(range(50, 75))
    rows = [[*first, 1], [*second, 2], [*first, 3], [*second, 4], [0, 1, 2, 3, 4, 99], [*first, 5]]
    assert prefix_groups(rows, 2) == [1, 2, 1, 2, 0, 1]
    assert prefix_groups(rows, 3) == [1, 0, 1, 0, 0, 1]
    assert prefix_groups([[*first, number] for number in range(4)], 2) == [0] * 4


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_common_prefix_is_the_longest_that_all_share(rows: list[list[int]]) -> None:
    size = common_prefix(rows)
    assert len({tuple(row[:size]) for row in rows}) == 1
    longer = {tuple(row[: size + 1]) for row in rows}
    assert len(longer) > 1 or size == min(map(len, rows))
