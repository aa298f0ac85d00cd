"""How soon an engine learns that a rank was killed: from SIGKILL to the exception of a step."""

import asyncio
import os
import signal
import time

from asyncexec.bench.case import Case, Point, Samples
from asyncexec.bench.payload import scheduler_output
from asyncexec.bench.peer import Peer

LIMIT_S = 3.0
"""A failure that no step has shown after so many seconds counts as this."""


async def measure(peer: Peer, point: Point, amount: float) -> Samples:
    """Milliseconds; the steps go on while the last rank is killed.  Nothing where the ranks are in the driver."""
    await peer.start()
    value = scheduler_output(point.requests)
    await peer.submit(value)
    pids = await peer.pids()
    if not pids:
        return {}
    os.kill(pids[-1], signal.SIGKILL)
    began = time.perf_counter()
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                await peer.submit(value)
    except TimeoutError:
        return {"failure_ms": [LIMIT_S * 1e3]}
    except Exception:  # noqa: BLE001 - each peer has an exception of its own: that one came is what is measured
        return {"failure_ms": [(time.perf_counter() - began) * 1e3]}


FAILURE = Case("failure", measure, fresh=True)
