"""The paged KV cache's book-keeping: which of its blocks are free."""

from collections.abc import Iterable


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free."""


class BlockAllocator:
    """Hands out the KV cache's blocks by number, and takes them back.

    The block that came back last is handed out first: its memory is the most likely to be in a CPU's cache.

    Attributes:
        num_blocks: how many blocks there are; their numbers are 0 to num_blocks - 1.
    """

    def __init__(self, num_blocks: int) -> None:
        """Start with every block free; raises ValueError unless there is at least one."""
        if num_blocks < 1:
            raise ValueError(f"a KV cache needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """How many blocks can be allocated now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks.

        Raises:
            OutOfBlocks: fewer are free; none is taken then.
            ValueError: `count` is negative.
        """
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks wanted, {len(self._free)} of {self.num_blocks} are free")
        taken = [self._free.pop() for _ in range(count)]
        self._used.update(taken)
        return taken

    def free(self, block_ids: Iterable[int]) -> None:
        """Give blocks back.

        Raises:
            ValueError: one of them is not allocated, or is named twice; none is freed then.
        """
        returned = list(block_ids)
        unknown = [block for block in returned if block not in self._used]
        if unknown:
            raise ValueError(f"not allocated, so cannot be freed: blocks {unknown}")
        if len(set(returned)) != len(returned):
            raise ValueError(f"a block is freed twice: {returned}")
        self._used.difference_update(returned)
        self._free.extend(reversed(returned))
