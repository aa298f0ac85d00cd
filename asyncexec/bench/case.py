"""The contract of a case: one thing to measure of any peer."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from asyncexec.bench.peer import Peer, missing

Samples = dict[str, list[float]]
"""What one turn measured: raw samples, by the name of the metric, which ends with its unit."""


class Point(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a case is measured.

    Attributes:
        ranks: of the peer.
        requests: in the scheduler output that each step carries.
        tensor_mib: MiB of the array that each step carries in place of a scheduler output; 0 is none.
        in_flight: steps under way at once.
        interval_ms: milliseconds from the start of one step to that of the next; 0 is back to back.
    """

    ranks: int
    requests: int = 64
    in_flight: int = 1
    interval_ms: float = 0.0
    tensor_mib: int = 0

    def __str__(self) -> str:
        pace = f"every {self.interval_ms:g} ms" if self.interval_ms else f"{self.in_flight} in flight"
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {self.payload}, {pace}"

    @property
    def payload(self) -> str:
        """What each step carries, for people."""
        return f"{self.tensor_mib} MiB tensor" if self.tensor_mib else f"{self.requests} requests"


@dataclass(frozen=True, slots=True)
class Case:
    """One case.

    Attributes:
        name: what results and tables call it.
        measure: does one turn with a peer at a point.  The last argument says how much: steps, or seconds.
        fresh: whether it starts, or breaks, the peer by itself: each turn gets a process of its own, which is killed
            afterwards.  Other cases share one that is running.
        needs: a method or attribute that a peer may lack, and is measured only with.
        packages: that must be installed, with the command that installs them.
    """

    name: str
    measure: Callable[[Peer, Point, float], Awaitable[Samples]]
    fresh: bool = False
    needs: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)

    def unavailable(self) -> str | None:
        """What is missing here and how to install it; None where nothing is."""
        return missing(self.packages)

    def can_measure(self, peer: type[Peer], point: Point) -> bool:
        """Whether a peer can do what is measured there."""
        if peer.max_ranks is not None and point.ranks > peer.max_ranks:
            return False
        if self.needs:
            return hasattr(peer, self.needs)
        return peer.tensors if point.tensor_mib else peer.requests
