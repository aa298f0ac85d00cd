"""The ring that intermediate tensors go through: what is sent arrives, however far sender and receiver are apart."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncexec_nccl.ring import ALIGNMENT, Batch, Ring

sizes = st.lists(st.integers(0, 5000), max_size=4)
capacities = st.integers(Ring.SMALLEST, 16 * ALIGNMENT)


@given(capacities, st.lists(sizes, max_size=12), st.randoms(use_true_random=False))
def test_what_is_sent_is_what_is_received(capacity: int, transfers: list[list[int]], draw: random.Random) -> None:
    sent = [[draw.randbytes(size) for size in transfer] for transfer in transfers]
    received = [[bytearray(size) for size in transfer] for transfer in transfers]
    memory = bytearray(capacity)
    places = [Ring(capacity), Ring(capacity)]
    todo: list[list[tuple[int, Batch]]] = [
        [(number, batch) for number, transfer in enumerate(transfers) for batch in ring.place(transfer)]
        for ring in places
    ]
    assert todo[0] == todo[1]  # nothing has to be said about the places
    done = [0, 0]  # batches sent, and taken
    while done[1] < len(todo[1]):
        can_send = done[0] < len(todo[0]) and (todo[0][done[0]][1].waits_for or 0) <= done[1]
        can_take = done[1] < done[0]
        assert can_send or can_take, "each waits for the other"
        if can_send and (not can_take or draw.random() < 0.5):
            number, batch = todo[0][done[0]]
            for piece in batch.pieces:
                source = sent[number][piece.buffer][piece.offset : piece.offset + piece.nbytes]
                memory[piece.begin : piece.begin + piece.nbytes] = source
            done[0] += 1
        else:
            number, batch = todo[1][done[1]]
            for piece in batch.pieces:
                part = memory[piece.begin : piece.begin + piece.nbytes]
                received[number][piece.buffer][piece.offset : piece.offset + piece.nbytes] = part
            done[1] += 1
        assert len(memory) == capacity
    assert received == sent


@given(capacities, st.lists(sizes, max_size=12))
def test_batches_are_numbered_and_lie_in_the_ring(capacity: int, transfers: list[list[int]]) -> None:
    ring = Ring(capacity)
    batches = [batch for transfer in transfers for batch in ring.place(transfer)]
    assert [batch.number for batch in batches] == list(range(1, len(batches) + 1))
    for batch in batches:
        assert batch.waits_for is None or batch.waits_for < batch.number
        for piece in batch.pieces:
            assert piece.begin % ALIGNMENT == 0
            assert piece.nbytes > 0
            assert piece.begin + piece.nbytes <= capacity


def test_a_transfer_that_fits_is_one_batch() -> None:
    ring = Ring(1 << 20)
    [batch] = ring.place([1000, 0, 200_000])
    assert [piece.buffer for piece in batch.pieces] == [0, 2]


def test_numbers_start_over() -> None:
    ring = Ring(Ring.SMALLEST)
    ring._number = (1 << 32) - 3
    numbers = [batch.number for _ in range(5) for batch in ring.place([ALIGNMENT])]
    assert numbers == [(1 << 32) - 2, (1 << 32) - 1, 0, 1, 2]


@pytest.mark.parametrize("capacity", [0, Ring.SMALLEST - 1])
def test_a_ring_that_is_too_small(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"{Ring.SMALLEST} at least"):
        Ring(capacity)
