"""The block allocator: every block has one owner at most, and misuse is told at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncexec.demo.blocks import BlockAllocator, OutOfBlocks


def test_blocks_are_distinct_and_come_back() -> None:
    allocator = BlockAllocator(4)
    first, second = allocator.allocate(1), allocator.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert allocator.num_free == 0
    allocator.free(second)
    assert allocator.num_free == 3
    assert sorted(allocator.allocate(3)) == sorted(second)


def test_no_blocks_is_a_request_too() -> None:
    allocator = BlockAllocator(1)
    assert allocator.allocate(0) == []
    allocator.free([])
    assert allocator.num_free == 1


def test_asking_for_too_many_takes_none() -> None:
    allocator = BlockAllocator(3)
    allocator.allocate(1)
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 of 3 are free"):
        allocator.allocate(3)
    assert allocator.num_free == 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [([7], r"not allocated.*\[7\]"), ([1], r"not allocated.*\[1\]"), ([0, 0], "freed twice"), ([0, 9], r"\[9\]")],
)
def test_freeing_what_is_not_allocated_is_refused_and_frees_none(returned: list[int], message: str) -> None:
    allocator = BlockAllocator(4)
    assert allocator.allocate(1) == [0]
    with pytest.raises(ValueError, match=message):
        allocator.free(returned)
    assert allocator.num_free == 3


def test_freeing_twice_is_refused() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(2)
    allocator.free(blocks)
    with pytest.raises(ValueError, match="not allocated"):
        allocator.free(blocks)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockAllocator(0)
    with pytest.raises(ValueError, match="-1 blocks"):
        BlockAllocator(1).allocate(-1)


@given(st.lists(st.integers(0, 5)))
def test_no_block_has_two_owners_and_none_is_lost(sizes: list[int]) -> None:
    allocator = BlockAllocator(8)
    owned: list[list[int]] = []
    for size in sizes:
        if size <= allocator.num_free:
            owned.append(allocator.allocate(size))
        else:
            allocator.free(owned.pop(0))
        held = [block for blocks in owned for block in blocks]
        assert len(set(held)) == len(held) == allocator.num_blocks - allocator.num_free
