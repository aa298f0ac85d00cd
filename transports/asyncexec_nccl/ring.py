"""Where in a ring of memory the parts of a transfer lie, in what order; a state machine without I/O.

Sender and receiver each have one, and give it the same transfers in the same order: so both know the places, and
nothing has to be said about them.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ALIGNMENT = 256
"""Bytes: every piece begins where any dtype may, and where copies are fast."""

_BATCHES = 4
"""Batches that a ring holds at least: one is written while another is read."""

_NUMBERS = 1 << 32


class Piece(NamedTuple):
    """A part of one buffer of a transfer, or all of it.

    Attributes:
        buffer: its place among the buffers.
        offset: where in it the piece begins, in bytes.
        nbytes: of the piece.
        begin: of the piece in the ring.
    """

    buffer: int
    offset: int
    nbytes: int
    begin: int


class Batch(NamedTuple):
    """Pieces that are sent, and taken out of the ring, together.

    Attributes:
        number: counted from 1 over all transfers, modulo 2^32.
        waits_for: the number of the batch that must have been taken before the ring's memory is written to; None where
            it has not been used yet.
        pieces: see above.
    """

    number: int
    waits_for: int | None
    pieces: Sequence[Piece]


class Ring:
    """Gives out the memory from its beginning to its end, and then again.

    Args:
        capacity: bytes, `SMALLEST` at least.
    """

    SMALLEST = _BATCHES * ALIGNMENT

    def __init__(self, capacity: int) -> None:
        if capacity < self.SMALLEST:
            raise ValueError(f"a ring of {capacity} bytes; valid: {self.SMALLEST} at least")
        self._capacity = capacity
        self._largest = capacity // _BATCHES // ALIGNMENT * ALIGNMENT
        self._head = 0
        self._number = 0
        self._used: collections.deque[tuple[int, int]] = collections.deque()  # begin and number, the oldest first

    def place(self, sizes: Sequence[int]) -> Iterator[Batch]:
        """The batches of the next transfer.

        Args:
            sizes: bytes of its buffers, any number of any size.
        """
        cut: list[tuple[int, int, int]] = []
        room = self._largest
        for buffer, size in enumerate(sizes):
            offset = 0
            while offset < size:
                if not room:
                    yield self._batch(cut)
                    cut, room = [], self._largest
                nbytes = min(size - offset, room)
                cut.append((buffer, offset, nbytes))
                offset += nbytes
                room -= aligned(nbytes)
        if cut:
            yield self._batch(cut)

    def _batch(self, cut: Sequence[tuple[int, int, int]]) -> Batch:
        begin, waits_for = self._allocate(sum(aligned(nbytes) for _, _, nbytes in cut))
        pieces = []
        for buffer, offset, nbytes in cut:
            pieces.append(Piece(buffer, offset, nbytes, begin))
            begin += aligned(nbytes)
        return Batch(self._number, waits_for, pieces)

    def _allocate(self, nbytes: int) -> tuple[int, int | None]:
        """Where the next batch begins, and what has to have been taken from there."""
        waits_for = None
        if self._head + nbytes > self._capacity:
            while self._used and self._used[0][0] >= self._head:  # of the round before, behind the last that fits
                waits_for = self._used.popleft()[1]
            self._head = 0
        begin, self._head = self._head, self._head + nbytes
        while self._used and begin <= self._used[0][0] < self._head:
            waits_for = self._used.popleft()[1]
        self._number = (self._number + 1) % _NUMBERS
        self._used.append((begin, self._number))
        return begin, waits_for


def aligned(nbytes: int) -> int:
    """The bytes, rounded up to where the next piece may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
