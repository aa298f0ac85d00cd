"""What is measured, how often and how much: the named suites."""

from collections.abc import Sequence

import msgspec

from asyncexec.bench.case import Point

REQUESTS = (0, 64, 256)
IN_FLIGHT = (1, 2, 4)
INTERVALS_MS = (2.0, 10.0)


class Part(msgspec.Struct, frozen=True):
    """One case of a suite.

    Attributes:
        case: its name.
        points: where it is measured.
        rounds: in each, every peer has a turn at every point.
        amount: of each turn: steps, or seconds.
    """

    case: str
    points: tuple[Point, ...]
    rounds: int
    amount: float


def _steps(ranks: int, rounds: int, amount: int) -> Part:
    """Payloads with one step in flight, and steps in flight with 64 requests."""
    payloads = [Point(ranks, requests=requests) for requests in REQUESTS]
    depths = [Point(ranks, in_flight=in_flight) for in_flight in IN_FLIGHT if in_flight > 1]
    return Part("steps", (*payloads, *depths), rounds, amount)


def _paced(ranks: int, rounds: int, amount: int) -> Part:
    return Part("steps", tuple(Point(ranks, interval_ms=interval) for interval in INTERVALS_MS), rounds, amount)


def _around(ranks: Sequence[int], rounds: int) -> list[Part]:
    points = tuple(Point(each) for each in ranks)
    return [
        Part("idle", points, rounds, 1.0),
        Part("life", points, rounds, 1),
        Part("failure", points, rounds, 1),
    ]


SUITES: dict[str, list[Part]] = {
    "quick": [
        Part("steps", (Point(1),), rounds=5, amount=50),
        _steps(2, rounds=6, amount=50),
        _paced(2, rounds=4, amount=30),
        *_around([2], rounds=2),
    ],
    "full": [
        *(_steps(ranks, rounds=8, amount=60) for ranks in (1, 2, 4)),
        *(_paced(ranks, rounds=4, amount=30) for ranks in (1, 2, 4)),
        *_around([2], rounds=4),
    ],
}
"""On two cores, quick takes less than 3 minutes and full less than 10."""
