"""How long a peer takes to be there, and to be gone."""

import time

from asyncexec.bench.case import Case, Point, Samples
from asyncexec.bench.payload import scheduler_output
from asyncexec.bench.peer import Peer


async def measure(peer: Peer, point: Point, amount: float) -> Samples:
    """Seconds until the first step is answered, and from then until all ranks have ended."""
    began = time.perf_counter()
    await peer.start()
    await peer.submit(scheduler_output(point.requests))
    there = time.perf_counter()
    await peer.close()
    return {"start_s": [there - began], "stop_s": [time.perf_counter() - there]}


LIFE = Case("life", measure, fresh=True)
