"""Memory that the driver and its ranks have mapped: a file in memory (memfd), which ends with the last that holds it.

It has no name that another process could open, and takes no room before it is written to.
"""

import mmap
import os

from asyncexec.errors import WireError


class SharedMemory:
    """The driver's half.

    Args:
        name: what it is called in /proc.

    Attributes:
        descriptor: for the ranks to inherit.
    """

    def __init__(self, name: str) -> None:
        self.descriptor = os.memfd_create(name)
        self._mapped: mmap.mmap | None = None

    def memory(self, nbytes: int) -> memoryview:
        """The memory, `nbytes` of it at least.  An earlier mapping ends with the last view of it."""
        if self._mapped is None or len(self._mapped) < nbytes:
            os.ftruncate(self.descriptor, nbytes)
            self._mapped = mmap.mmap(self.descriptor, nbytes)
        return memoryview(self._mapped)

    def close(self) -> None:
        """Let go of it; the mapping ends with the last view."""
        self._mapped = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class RankMemory:
    """A rank's half.

    Args:
        descriptor: inherited; owned from now on.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self._mapped: mmap.mmap | None = None

    def mapped(self, nbytes: int) -> mmap.mmap:
        """All of the memory; mapped again, in place of an earlier mapping, when the driver has made it larger.

        Raises:
            WireError: it is smaller than `nbytes`.  Reading beyond its end would kill the process.
        """
        if self._mapped is None or len(self._mapped) < nbytes:
            there = os.fstat(self._descriptor).st_size
            if there < nbytes:
                raise WireError(f"{nbytes} bytes of shared memory are announced, and there are {there}")
            self._mapped = mmap.mmap(self._descriptor, there)
        return self._mapped
