"""Runs a suite: the peers take turns, A B A B, so that what slows the machine for a while slows all of them."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from asyncexec.bench.case import Point
from asyncexec.bench.cases import CASES
from asyncexec.bench.cluster import ray_cluster
from asyncexec.bench.host import Host, PeerFailed
from asyncexec.bench.peer import Peer
from asyncexec.bench.results import Failure, Line, Turn
from asyncexec.bench.suites import Part

Progress = Callable[[str, int], None]
"""Told what is being measured, and how many turns are behind it."""


class Harness:
    """One run of a suite.

    Args:
        parts: of the suite.
        peers: by name; each is available here.
        keep: takes each line of the results as soon as it is known.
        progress: told before each turn.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        peers: Mapping[str, type[Peer]],
        keep: Callable[[Line], None],
        progress: Progress,
    ) -> None:
        self._parts, self._peers, self._keep, self._progress = parts, peers, keep, progress
        self._behind = 0

    @property
    def turns(self) -> int:
        """How many there are."""
        return sum(part.rounds * len(self._able(part.case, point)) for part in self._parts for point in part.points)

    def run(self) -> None:
        """Measure everything.

        Raises:
            AsyncExecError: peers need Ray, and it did not start.
        """
        uses_ray = any(peer.uses_ray for peer in self._peers.values())
        with ray_cluster() if uses_ray else contextlib.nullcontext():
            for ranks in sorted({point.ranks for part in self._parts for point in part.points}):
                self._run_shared(ranks)
            for part in self._parts:
                if CASES[part.case].fresh:
                    self._run_fresh(part)

    def _able(self, case: str, point: Point) -> list[str]:
        return [name for name, peer in self._peers.items() if CASES[case].can_measure(peer, point)]

    def _run_shared(self, ranks: int) -> None:
        """Every case that is measured of running peers, at this number of ranks."""
        parts = [
            (part, points)
            for part in self._parts
            if not CASES[part.case].fresh and (points := [point for point in part.points if point.ranks == ranks])
        ]
        if not parts:
            return
        with _running() as hosts:
            able = [self._able(part.case, point) for part, points in parts for point in points]
            for name in [name for name in self._peers if any(name in names for names in able)]:
                self._progress(f"starting {name}", self._behind)
                with self._reporting(parts[0][0].case, Point(ranks), name):
                    hosts[name] = Host(name, ranks, keeps_running=True)
            for part, points in parts:
                for number, point in itertools.product(range(part.rounds), points):
                    self._run_turns(part, point, number, hosts)
            for name, host in hosts.items():
                with self._reporting(parts[-1][0].case, Point(ranks), name):
                    host.close()

    def _run_turns(self, part: Part, point: Point, number: int, hosts: dict[str, Host]) -> None:
        """One turn of each peer that is still there."""
        for name in [name for name in self._able(part.case, point) if name in hosts]:
            host = hosts[name]
            with self._reporting(part.case, point, name) as reported:
                self._take_turn(host, part, point, number)
            if reported:
                hosts.pop(name).kill()

    def _run_fresh(self, part: Part) -> None:
        """A case that has a process for each turn."""
        failed: set[tuple[Point, str]] = set()
        for number, point in itertools.product(range(part.rounds), part.points):
            for name in self._able(part.case, point):
                if (point, name) in failed:
                    continue
                with self._reporting(part.case, point, name) as reported:
                    host = Host(name, point.ranks, keeps_running=False)
                    try:
                        self._take_turn(host, part, point, number)
                    finally:
                        host.kill()
                if reported:
                    failed.add((point, name))

    def _take_turn(self, host: Host, part: Part, point: Point, number: int) -> None:
        self._progress(f"{part.case}: {host.peer}, {point}", self._behind)
        self._behind += 1
        samples = host.turn(CASES[part.case], point, part.amount)
        self._keep(Turn(part.case, point, host.peer, number, samples))

    @contextlib.contextmanager
    def _reporting(self, case: str, point: Point, peer: str) -> Iterator[list[Failure]]:
        """A peer that fails is reported, and the others go on; gives a list that has the failure afterwards."""
        reported: list[Failure] = []
        try:
            yield reported
        except PeerFailed as error:
            reported.append(Failure(case, point, peer, str(error)))
            self._keep(reported[0])


@contextlib.contextmanager
def _running() -> Iterator[dict[str, Host]]:
    """Hosts by name; none of their processes is left afterwards, however that comes."""
    hosts: dict[str, Host] = {}
    try:
        yield hosts
    finally:
        for host in hosts.values():
            host.kill()
