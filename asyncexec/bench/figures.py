"""Figures that take more than one point: what a rank costs, and what an array costs beside its copies."""

import random
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from asyncexec.bench.case import Point
from asyncexec.bench.ratios import RESAMPLES, Ratio, quantile
from asyncexec.bench.results import Results


class Slope(NamedTuple):
    """How the latency of a step grows with the ranks.

    Attributes:
        peer: whose.
        payload: of the steps.
        ranks: the numbers that were measured.
        us: microseconds for each further rank, with the interval that holds it with 95% confidence.
    """

    peer: str
    payload: str
    ranks: tuple[int, ...]
    us: Ratio


class Carried(NamedTuple):
    """What a step with an array costs beside what it must.

    Attributes:
        peer: whose.
        point: ranks and array.
        ratio: of the step's latency to one copy of the array for each rank and a step of the floor without requests.
    """

    peer: str
    point: Point
    ratio: float


def slopes(results: Results) -> list[Slope]:
    """The slopes of all peers that were measured at three numbers of ranks or more, one step in flight."""
    medians: dict[tuple[str, str], dict[int, dict[int, float]]] = defaultdict(dict)
    for (case, point), peers in results.turns.items():
        if case == "steps" and point == Point(point.ranks, point.requests, tensor_mib=point.tensor_mib):
            for peer, rounds in peers.items():
                by_round = {number: statistics.median(samples["latency_us"]) for number, samples in rounds.items()}
                medians[peer, point.payload][point.ranks] = by_round
    found = sorted((payload, peer, by_ranks) for (peer, payload), by_ranks in medians.items() if len(by_ranks) >= 3)
    return [Slope(peer, payload, tuple(sorted(by)), _slope(by)) for payload, peer, by in found]


def carried(results: Results) -> Iterator[Carried]:
    """Of all peers, where copies and the floor were measured too."""
    for (case, point), peers in results.turns.items():
        if case != "steps" or not point.tensor_mib or "memcpy" not in peers:
            continue
        floor = results.turns.get((case, Point(point.ranks, requests=0)), {}).get("floor")
        if floor is None:
            continue
        least = _median(peers["memcpy"]) + _median(floor)
        for peer in peers:
            if peer != "memcpy":
                yield Carried(peer, point, _median(peers[peer]) / least)


def _median(rounds: Mapping[int, Mapping[str, Sequence[float]]]) -> float:
    return statistics.median(statistics.median(samples["latency_us"]) for samples in rounds.values())


def _slope(by_ranks: Mapping[int, Mapping[int, float]]) -> Ratio:
    """The slope of the least squares through the medians; the interval is the percentile bootstrap's over rounds."""
    numbers = sorted(set.intersection(*(set(rounds) for rounds in by_ranks.values())))
    draw = random.Random(0)
    drawn = sorted(_through(by_ranks, draw.choices(numbers, k=len(numbers))) for _ in range(RESAMPLES))
    value = _through(by_ranks, numbers)
    return Ratio(value, min(value, quantile(drawn, 0.025)), max(value, quantile(drawn, 0.975)))


def _through(by_ranks: Mapping[int, Mapping[int, float]], rounds: Sequence[int]) -> float:
    latencies = [statistics.median(by_round[number] for number in rounds) for by_round in by_ranks.values()]
    return statistics.linear_regression(list(by_ranks), latencies).slope
