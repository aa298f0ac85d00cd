"""What is measured, how often and how much: the named suites."""

from collections.abc import Sequence
from typing import Any

import msgspec

from asyncexec.bench.case import Point

RANKS = (1, 2, 4, 8)
REQUESTS = (0, 64, 256)
TENSORS_MIB = (1, 16)
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


def _wide(ranks: Sequence[int], rounds: int, amount: int) -> Part:
    """One step in flight on more and more ranks: what a rank costs."""
    return Part(
        "steps", tuple(Point(each, requests=requests) for each in ranks for requests in (0, 64)), rounds, amount
    )


def _tensors(ranks: Sequence[int], rounds: int, amount: int) -> Part:
    return Part("steps", tuple(Point(each, tensor_mib=mib) for each in ranks for mib in TENSORS_MIB), rounds, amount)


def _grid() -> Part:
    """Everything with everything."""
    payloads: list[dict[str, Any]] = [{"requests": requests} for requests in REQUESTS] + [
        {"tensor_mib": mib} for mib in TENSORS_MIB
    ]
    paces: list[dict[str, Any]] = [{"in_flight": in_flight} for in_flight in IN_FLIGHT] + [
        {"interval_ms": ms} for ms in INTERVALS_MS
    ]
    points = (Point(ranks, **payload, **pace) for ranks in RANKS for payload in payloads for pace in paces)
    return Part("steps", tuple(points), rounds=8, amount=60)


def _around(ranks: Sequence[int], rounds: int) -> list[Part]:
    points = tuple(Point(each) for each in ranks)
    return [
        Part("idle", points, rounds, 1.0),
        Part("life", points, rounds, 1),
        Part("failure", points, rounds, 1),
    ]


def _overlap(stages: Sequence[int], rounds: int, steps: int) -> Part:
    """As many steps in flight as there are stages."""
    return Part("overlap", tuple(Point(each, in_flight=each) for each in stages), rounds, steps)


def _aggregation(rounds: int) -> Part:
    """So many ranks, and so many requests that all of them finish in every step."""
    points = tuple(Point(ranks, requests=requests) for ranks, requests in ((64, 4), (64, 0), (8, 32), (2, 4)))
    return Part("aggregation", points, rounds, 100)


def _demo(ranks: Sequence[int], rounds: int, tokens: int) -> Part:
    """Eight prompts at once."""
    return Part("demo", tuple(Point(each, requests=8) for each in ranks), rounds, tokens)


SUITES: dict[str, list[Part]] = {
    "quick": [
        Part("steps", (Point(1),), rounds=5, amount=50),
        _steps(2, rounds=6, amount=50),
        _paced(2, rounds=4, amount=30),
        _tensors([2], rounds=3, amount=20),
        Part("rpc", (Point(2),), rounds=4, amount=50),
        *_around([2], rounds=2),
        _overlap([2], rounds=1, steps=10),
        _aggregation(rounds=2),
        _demo([2], rounds=1, tokens=48),
    ],
    "full": [
        *(_steps(ranks, rounds=6, amount=50) for ranks in (1, 2, 4)),
        *(_paced(ranks, rounds=4, amount=30) for ranks in (2, 4)),
        _wide([8], rounds=6, amount=50),
        _tensors([2, 4], rounds=4, amount=20),
        Part("rpc", tuple(map(Point, (1, 2, 4))), rounds=4, amount=50),
        *_around([2], rounds=3),
        _overlap([2, 4], rounds=1, steps=10),
        _aggregation(rounds=3),
        _demo([2], rounds=1, tokens=64),
    ],
    "grid": [
        _grid(),
        Part("rpc", tuple(map(Point, RANKS)), rounds=8, amount=60),
        *_around(RANKS, rounds=4),
        _overlap([2, 4, 8], rounds=4, steps=10),
        _aggregation(rounds=4),
        _demo([1, 2, 4], rounds=4, tokens=96),
    ],
}
"""On two cores, quick takes 3 to 5 minutes, full less than 10, and the whole grid hours: choose some of it."""
