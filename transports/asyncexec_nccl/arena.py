"""Which parts of a piece of memory are in use, and by which ranks; a state machine without I/O."""

import bisect
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

_ALIGNMENT = 64
"""Bytes: every region begins where any dtype may, and on a cache line of its own."""


class Region(NamedTuple):
    """A part of the memory that the driver fills once and several ranks copy from.

    Attributes:
        begin, end: its bytes; `end` is rounded up.
        number: counted from 1 in the order of allocation.  A rank that has copied it has copied those before it too.
        ranks: who has still to copy it.
    """

    begin: int
    end: int
    number: int
    ranks: frozenset[int]


class Arena:
    """Hands out regions, the first gap that is large enough, and takes them back when all their ranks have copied them.

    So the memory that is touched is no more than was in use at once, and a rank that lags behind withholds its own
    regions alone.

    Args:
        capacity: bytes.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._regions: list[Region] = []  # by where they begin
        self._allocated = 0

    @property
    def in_use(self) -> Sequence[Region]:
        """The regions that some rank has not been seen to have copied, in the order of their bytes."""
        return self._regions

    def allocate(self, nbytes: int, ranks: Collection[int]) -> Region | None:
        """A region of `nbytes` for these ranks; None where no gap is large enough."""
        needed = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        begin = 0
        for region in self._regions:
            if region.begin - begin >= needed:
                break
            begin = region.end
        if begin + needed > self._capacity:
            return None
        self._allocated += 1
        region = Region(begin, begin + needed, self._allocated, frozenset(ranks))
        bisect.insort(self._regions, region)
        return region

    def reclaim(self, copied: Sequence[int]) -> None:
        """Take back what has been copied; `copied` has, for each rank, the number of the last region that it copied."""
        self._keep(lambda region, rank: copied[rank] < region.number)

    def forget(self, ranks: Collection[int]) -> None:
        """Wait no longer for ranks that have ended."""
        self._keep(lambda _, rank: rank not in ranks)

    def _keep(self, owes: Callable[[Region, int], bool]) -> None:
        still = (
            region._replace(ranks=frozenset(rank for rank in region.ranks if owes(region, rank)))
            for region in self._regions
        )
        self._regions = [region for region in still if region.ranks]
