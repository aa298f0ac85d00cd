"""What brings tensors from a GPU to the next stage's: by copies (`peer_copies`) or by NCCL (`nccl_pairs`).

Both sides give a way the same tensors in the same order; it knows them by that alone.
"""

import abc
from collections.abc import Sequence
from typing import Any


class Way:
    """One side of it.  Neither method does anything, unless the sides have hold of something of each other."""

    def let_go(self) -> None:
        """Of what is the other side's; the way is not used any more."""

    def close(self) -> None:
        """Free what the other side has let go of, unless it is gone or stuck."""


class SendingWay(Way, abc.ABC):
    """What brings tensors to the next stage's GPU."""

    @abc.abstractmethod
    def send(self, parts: Sequence[Any]) -> None:
        """Send contiguous tensors once what computes them is done; their memory is not reused before they are sent.

        Returns before they have been sent.  Where it raises, some may have been, and some not.
        """


class ReceivingWay(Way, abc.ABC):
    """What brings tensors from the previous stage's GPU."""

    @abc.abstractmethod
    def receive(self, layouts: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Any]:
        """Receive tensors of these dtypes and shapes; what the worker computes afterwards waits for them.

        Returns before they have been received.  Where it raises, some may have been, and some not.
        """
