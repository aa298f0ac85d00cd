"""The contract of a peer: one way to run a step on some ranks."""

import abc
import importlib.util
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, ClassVar

from asyncexec.bench.payload import Payload


class Peer(abc.ABC):
    """Ranks that echo what they are given.  It lives in a process of its own, on that process's event loop.

    Some peers have more, and are measured by more cases:

    - `call(number)` runs a method by name on all ranks: awaiting it gives that number from each.
    - `start_pipeline(seconds)` starts the ranks as the stages of a pipeline, in place of `start`: each takes so long
      for a step, and hands it on to the next one.
    - `merging(steps)` prepares to merge what the ranks of each step report: the ids of the requests that they have
      finished with.  What it returns does so, and returns how many requests all ranks have finished with.
    - `engine_config` is the configuration for an executor with process groups, but for its sizes.

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
        return missing(cls.needs)

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


class WithoutRanks(Peer):
    """It only does something in the driver's process."""

    async def start(self) -> None:
        """Nothing to start."""

    async def pids(self) -> Sequence[int]:
        """There are none."""
        return []

    async def close(self) -> None:
        """Nothing to end."""


def missing(needs: Mapping[str, str]) -> str | None:
    """Which of these packages are not installed, and the commands that install them; None where all are."""
    names = [name for name in needs if importlib.util.find_spec(name) is None]
    return "; ".join(f"{name} is not installed: {needs[name]}" for name in names) or None


MAX_IN_FLIGHT = 4
"""Steps that a peer must be able to have in flight."""

MAX_RAY_RANKS = 4
"""The readers of a Ray graph wait actively: with more of them, few cores measure their scheduler alone."""
