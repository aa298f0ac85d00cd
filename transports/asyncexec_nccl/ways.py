"""What brings tensors from a GPU to the next stage's: by copies (`peer_copies`) or by NCCL (`nccl_pairs`).

Both sides give a way the same tensors in the same order; it knows them by that alone.
"""

import abc
from collections.abc import Sequence
from typing import Any


class SendingWay(abc.ABC):
    """What brings tensors to the next stage's GPU."""

    @abc.abstractmethod
    def send(self, parts: Sequence[Any]) -> None:
        """Send contiguous tensors once what computes them is done; their memory is not reused before they are sent.

        Returns before they have been sent.  Where it raises, some may have been, and some not.
        """

    @abc.abstractmethod
    def let_go(self) -> None:
        """Of what is the other side's; nothing is sent any more."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free what the other side has let go of, unless it is gone or stuck."""


class ReceivingWay(abc.ABC):
    """What brings tensors from the previous stage's GPU."""

    @abc.abstractmethod
    def receive(self, layouts: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Any]:
        """Receive tensors of these dtypes and shapes; what the worker computes afterwards waits for them.

        Returns before they have been received.  Where it raises, some may have been, and some not.
        """

    @abc.abstractmethod
    def let_go(self) -> None:
        """Of what is the other side's; nothing is received any more."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free what the other side has let go of, unless it is gone or stuck."""
