"""The contract of a peer: one way to run a step on some ranks."""

import abc
import importlib.util
from collections.abc import Awaitable, Sequence
from typing import Any, ClassVar

from asyncexec.bench.payload import Payload


class Peer(abc.ABC):
    """Ranks that echo what they are given.  It lives in a process of its own, on that process's event loop.

    A peer that can run a method by name on all its ranks has `call(number)` too: awaiting it gives that number from
    each rank.

    Attributes:
        needs: packages that must be installed, with the command that installs them.
        uses_ray: whether the harness provides a Ray cluster, whose address is in `RAY_ADDRESS`.
        max_ranks: more it cannot have; None where there is no limit.
        requests: whether its steps can carry scheduler outputs,
        tensors: and whether they can carry arrays.
        ranks: how many it has.
    """

    needs: ClassVar[dict[str, str]] = {}
    uses_ray: ClassVar[bool] = False
    max_ranks: ClassVar[int | None] = None
    requests: ClassVar[bool] = True
    tensors: ClassVar[bool] = True

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    @classmethod
    def unavailable(cls) -> str | None:
        """What is missing here and how to install it; None where nothing is."""
        missing = [name for name in cls.needs if importlib.util.find_spec(name) is None]
        return "; ".join(f"{name} is not installed: {cls.needs[name]}" for name in missing) or None

    @abc.abstractmethod
    async def start(self) -> None:
        """Bring up the ranks."""

    @abc.abstractmethod
    def submit(self, value: Payload) -> Awaitable[Any]:
        """Start one step on all ranks, at the latest in the next turn of the loop.

        Awaiting gives the first rank's answer (a scheduler output is echoed, of an array the size is told), or raises
        whatever this peer raises if a rank is gone.  At most 4 steps are in flight, and they are awaited in order.
        """

    @abc.abstractmethod
    async def pids(self) -> Sequence[int]:
        """The processes of the ranks; none if they are in the driver's process."""

    @abc.abstractmethod
    async def close(self) -> None:
        """End the ranks, and wait until they have ended."""


MAX_IN_FLIGHT = 4
"""Steps that a peer must be able to have in flight."""

MAX_RAY_RANKS = 4
"""The readers of a Ray graph wait actively: with more of them, few cores measure their scheduler alone."""
