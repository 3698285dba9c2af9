"""The rows that a batch has picked: kept while most are used, so that only new ones are copied."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from dlplora.adapters import LoraPair
from dlplora.lora.mix import BatchMix
from dlplora.lora.picked import Picked
from dlplora.lora.stacks import Resident, Stack

LIKE = torch.empty(0)


def adapter(stack: Stack, rank: int) -> Resident:
    """An adapter of random matrices in a stack of one layer."""
    one = Resident(("q",), None)
    if rank:
        pair = LoraPair(torch.randn(rank, 6), torch.randn(4, rank), 1.0)
        one.rows[stack] = stack.add({"q": pair}, LIKE)
    return one


def expected(stack: Stack, *adapters: Resident) -> Tensor:
    """The rows of A of adapters, behind the row that is zero."""
    rows = [row for one in adapters for row in one.rows.get(stack, ())]
    return stack.matrices.down[:, [0, *rows]].transpose(0, 1)


def test_only_rows_of_new_adapters_are_copied() -> None:
    stack, picked = Stack(), Picked()
    first, second, third = (adapter(stack, rank) for rank in (20, 3, 2))
    picked.add([first])
    before = picked.down(stack, stack.matrices)
    assert torch.equal(before, expected(stack, first))
    was = before.clone()
    stack.matrices.down[:, list(first.rows[stack])] = torch.nan  # nobody reads them again
    for new, all_of_them in ((second, [second]), (third, [second, third])):
        picked.add([new])
        found = picked.down(stack, stack.matrices)
        assert torch.equal(found[: len(was)], was)
        assert torch.equal(found[len(was) :], expected(stack, *all_of_them)[1:])
        assert found.data_ptr() == before.data_ptr()
    assert picked.rows(stack).tolist() == [
        0,
        *(row for one in (first, second, third) for row in one.rows[stack]),
    ]


def test_an_adapter_without_rows_in_a_stack_has_the_row_that_is_zero() -> None:
    stack, other, picked = Stack(), Stack(), Picked()
    first = adapter(stack, 3)
    picked.add([first])
    assert picked.rows(stack).tolist() == [0, 1, 2, 3]
    picked.add([adapter(stack, 0), adapter(other, 2), adapter(stack, 1)])
    assert picked.rows(stack).tolist() == [0, 1, 2, 3, 0, 0, 4]
    assert picked.rows(other).tolist() == [0, 0, 0, 0, 1, 2, 0]
    assert not picked.down(stack, stack.matrices)[4:6].any()


def test_a_stack_that_has_another_layer_by_now_is_picked_again() -> None:
    stack, picked = Stack(), Picked()
    first = adapter(stack, 3)
    picked.add([first])
    assert picked.down(stack, stack.matrices).shape == (4, 1, 6)
    late = Resident(("v",), None)
    pair = LoraPair(torch.randn(2, 6), torch.randn(5, 2), 1.0)
    late.rows[stack] = stack.add({"v": pair}, LIKE)
    picked.add([late])
    found = picked.down(stack, stack.matrices)
    assert torch.equal(found, expected(stack, first, late))
    assert torch.equal(found[4:, 1], pair.down_RI)


@pytest.mark.parametrize(("rank", "fits"), [(1, True), (5, True), (6, False), (64, False)])
def test_what_is_picked_fits_while_four_fifths_of_the_ranks_are_used(rank: int, fits: bool) -> None:
    stack, picked = Stack(), Picked()
    gone, *used = adapter(stack, rank), *(adapter(stack, 5) for _ in range(4))
    picked.add([gone, *used[:3]])
    assert picked.fits(used) == fits


def test_an_adapter_that_a_batch_has_left_behind_is_let_go() -> None:
    stack = Stack()
    small, large = adapter(stack, 1), adapter(stack, 40)
    mix = BatchMix([((small, 1.0),), ((large, 1.0),)])
    gone = weakref.ref(large)
    del large
    gc.collect()
    assert gone() is not None
    mix = mix.select([0])
    gc.collect()
    assert gone() is None
    assert mix.rows == (((small, 1.0),),)
