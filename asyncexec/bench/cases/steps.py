"""Awaited steps: their latency, how many a second, and the processor time that each takes of driver and ranks."""

import asyncio
import collections
import os
import time
from collections.abc import Awaitable
from typing import Any

from asyncexec.bench.case import Case, Point, Samples
from asyncexec.bench.payload import Payload, array, scheduler_output
from asyncexec.bench.peer import Peer
from asyncexec.bench.processes import processor_seconds

WARM_UP = 20
"""Steps before those that are measured: the peer was stopped until its turn, or has done nothing yet."""


async def measure(peer: Peer, point: Point, amount: float) -> Samples:
    """`amount` steps."""
    value = array(point.tensor_mib) if point.tensor_mib else scheduler_output(point.requests)
    steps = max(5, int(amount) // max(1, point.tensor_mib))
    run = _paced if point.interval_ms else back_to_back
    await run(peer, value, point, WARM_UP if not point.tensor_mib else 2)
    pids = [os.getpid(), *await peer.pids()]
    used, began = processor_seconds(pids), time.perf_counter()
    latencies = await run(peer, value, point, steps)
    seconds, used = time.perf_counter() - began, processor_seconds(pids) - used
    samples = {"latency_us": [latency * 1e6 for latency in latencies], "cpu_us_per_step": [used / steps * 1e6]}
    if not point.interval_ms:
        samples["steps_per_s"] = [steps / seconds]
    return samples


async def back_to_back(peer: Peer, value: Payload, point: Point, steps: int) -> list[float]:
    """Seconds of each step from its submission to its answer; a step is submitted as soon as there is room."""
    under_way: collections.deque[tuple[float, Awaitable[Any]]] = collections.deque()
    latencies = []
    for _ in range(steps):
        under_way.append((time.perf_counter(), peer.submit(value)))
        if len(under_way) == point.in_flight:
            latencies.append(await _taken(under_way))
    while under_way:
        latencies.append(await _taken(under_way))
    return latencies


async def _taken(under_way: collections.deque[tuple[float, Awaitable[Any]]]) -> float:
    began, answer = under_way.popleft()
    await answer
    return time.perf_counter() - began


async def _paced(peer: Peer, value: Payload, point: Point, steps: int) -> list[float]:
    """The same, a step at a time, each at its moment: in between, as while a GPU computes, nothing happens."""
    latencies = []
    start = time.perf_counter()
    for number in range(steps):
        await asyncio.sleep(start + number * point.interval_ms / 1e3 - time.perf_counter())
        began = time.perf_counter()
        await peer.submit(value)
        latencies.append(time.perf_counter() - began)
    return latencies


STEPS = Case("steps", measure)
