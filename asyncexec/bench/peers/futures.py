"""`concurrent.futures`: a pool of one process for each rank, pickled arguments and results."""

import asyncio
import multiprocessing
import os
from collections.abc import Awaitable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from asyncexec.bench.payload import Payload, echo
from asyncexec.bench.peer import Peer
from asyncexec.bench.processes import end_with_parent


class Futures(Peer):
    """What the standard library offers for asyncio: `run_in_executor` on each pool, and `gather`."""

    async def start(self) -> None:
        """Start the pools; a pool starts its process with its first task."""
        context = multiprocessing.get_context("spawn")
        self._pools = [ProcessPoolExecutor(1, context, initializer=end_with_parent) for _ in range(self.ranks)]
        await self.pids()

    def submit(self, value: Payload) -> Awaitable[Any]:
        """A task for each pool."""
        loop = asyncio.get_running_loop()
        return asyncio.gather(*(loop.run_in_executor(pool, echo, value) for pool in self._pools))

    async def pids(self) -> Sequence[int]:
        """Asked of the pools' processes."""
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(pool, os.getpid) for pool in self._pools))

    async def close(self) -> None:
        """Shut the pools down."""
        for pool in self._pools:
            await asyncio.to_thread(pool.shutdown)
