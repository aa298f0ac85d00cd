"""Merging what the ranks' KV connectors report with each step, as the driver does where prefill is disaggregated."""

import time

from asyncexec.bench.case import Case, Point, Samples
from asyncexec.bench.peer import Peer

SAMPLES = 5
"""Of a turn; before them, as much is merged that does not count."""


async def measure(peer: Peer, point: Point, amount: float) -> Samples:
    """Microseconds for each of `amount` steps; in each, every rank has finished sending the same `requests`."""
    steps = [
        [{f"cmpl-{step}-{number}" for number in range(point.requests)} for _ in range(point.ranks)]
        for step in range(int(amount))
    ]
    microseconds = []
    for _ in range(SAMPLES + 1):
        merge = getattr(peer, AGGREGATION.needs)(steps)
        began = time.perf_counter()
        finished = merge()
        microseconds.append((time.perf_counter() - began) / len(steps) * 1e6)
        if finished != point.requests * len(steps):
            raise ValueError(f"{finished} requests were finished on all ranks, of {point.requests * len(steps)}")
    return {"merge_us": microseconds[1:]}


AGGREGATION = Case("aggregation", measure, fresh=True, needs="merging")
