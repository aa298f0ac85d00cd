"""`collective_rpc`: a method by name on every rank, and every rank's answer."""

import time

from asyncexec.bench.case import Case, Point, Samples
from asyncexec.bench.peer import Peer

WARM_UP = 20
"""Calls before those that are measured."""


async def measure(peer: Peer, point: Point, amount: float) -> Samples:
    """`amount` calls, one after the other."""
    call = getattr(peer, RPC.needs)
    for number in range(WARM_UP):
        await call(number)
    latencies = []
    for number in range(int(amount)):
        began = time.perf_counter()
        answers = await call(number)
        latencies.append((time.perf_counter() - began) * 1e6)
        if list(answers) != [number] * point.ranks:
            raise ValueError(f"the ranks answered {answers!r} to {number}")
    return {"rpc_us": latencies}


RPC = Case("rpc", measure, needs="call")
