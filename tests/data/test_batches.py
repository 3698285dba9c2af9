"""Padding and the order of batches."""

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from dlplora.data.batches import batch_order, common_prefix, pad_left, pad_right

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


@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 9))
def test_every_row_comes_about_equally_often(lengths: list[int], size: int, seed: int) -> None:
    window = 8 * size
    num_windows = len(lengths)  # so many windows hold whole epochs: 8 · size of them
    drawn = [
        row
        for batch in islice(batch_order(lengths, size, seed=seed), 8 * num_windows)
        for row in batch
    ]
    assert len(drawn) == window * num_windows
    assert {drawn.count(row) for row in range(len(lengths))} == {window}


def test_batches_hold_like_lengths_and_repeat_by_their_seed() -> None:
    lengths = list(range(64))
    first = list(islice(batch_order(lengths, 8, seed=3), 8))
    assert first == list(islice(batch_order(lengths, 8, seed=3), 8))
    assert first != list(islice(batch_order(lengths, 8, seed=4), 8))
    assert all(max(batch) - min(batch) == 7 for batch in first)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_common_prefix_is_the_longest_that_all_share(rows: list[list[int]]) -> None:
    size = common_prefix(rows)
    assert len({tuple(row[:size]) for row in rows}) == 1
    longer = {tuple(row[: size + 1]) for row in rows}
    assert len(longer) > 1 or size == min(map(len, rows))
