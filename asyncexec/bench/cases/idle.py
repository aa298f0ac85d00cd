"""What a peer costs that has nothing to do: processor time of driver and ranks while no step is submitted."""

import asyncio
import os
import time

from asyncexec.bench.case import Case, Point, Samples
from asyncexec.bench.payload import scheduler_output
from asyncexec.bench.peer import Peer
from asyncexec.bench.processes import processor_seconds


async def measure(peer: Peer, point: Point, amount: float) -> Samples:
    """Cores in use over `amount` seconds, after one step."""
    await peer.submit(scheduler_output(point.requests))
    pids = [os.getpid(), *await peer.pids()]
    used, began = processor_seconds(pids), time.perf_counter()
    await asyncio.sleep(amount)
    return {"idle_cores": [(processor_seconds(pids) - used) / (time.perf_counter() - began)]}


IDLE = Case("idle", measure)
