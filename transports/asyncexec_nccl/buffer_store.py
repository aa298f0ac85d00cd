"""Memory that a rank receives into, used again: new memory is touched page by page, at several times a copy's cost."""

import sys


class BufferStore:
    """Memory for buffers, which is given out again once nobody has it any more.

    Args:
        capacity: bytes that are kept at most.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kept: list[bytearray] = []  # the one given out last is the last

    def take(self, nbytes: int) -> memoryview:
        """Memory of this size, with anything in it."""
        for index, size in enumerate(map(len, self._kept)):
            if nbytes <= size <= nbytes + nbytes // 4 and _is_unused(self._kept, index):
                self._kept.append(self._kept.pop(index))
                return memoryview(self._kept[-1])[:nbytes]
        memory = bytearray(nbytes)
        self._kept.append(memory)
        while sum(map(len, self._kept)) > self._capacity:
            del self._kept[0]
        return memoryview(memory)


def _references(kept: list[bytearray], index: int) -> int:
    return sys.getrefcount(kept[index])


_UNUSED = _references([bytearray(1)], 0)


def _is_unused(kept: list[bytearray], index: int) -> bool:
    """Whether the list alone has it: every view of a bytearray, and what lies over one, has a reference to it."""
    return _references(kept, index) == _UNUSED
