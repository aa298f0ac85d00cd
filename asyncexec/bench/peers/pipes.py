"""`multiprocessing` pipes: a process for each rank, and a thread for each that waits for its replies."""

import asyncio
import multiprocessing
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from asyncexec.bench.payload import Payload, echo
from asyncexec.bench.peer import Peer
from asyncexec.bench.processes import end_with_parent


def _serve(connection: "Connection[Any, Any]") -> None:
    end_with_parent()
    while (value := connection.recv()) is not None:
        connection.send(echo(value))


class _Rank:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()
        self._reader = ThreadPoolExecutor(1)

    def call(self, value: Payload) -> asyncio.Future[Any]:
        self.connection.send(value)
        return asyncio.get_running_loop().run_in_executor(self._reader, self.connection.recv)

    def close(self) -> None:
        self.connection.send(None)
        self.process.join()
        self._reader.shutdown()
        self.connection.close()


class Pipes(Peer):
    """Pickles over pipes; the loop sends, threads receive."""

    async def start(self) -> None:
        """Start the processes."""
        self._ranks = [_Rank() for _ in range(self.ranks)]

    def submit(self, value: Payload) -> Awaitable[Any]:
        """Send to each rank, and wait for all."""
        return asyncio.gather(*[rank.call(value) for rank in self._ranks])

    async def pids(self) -> Sequence[int]:
        """Of the processes."""
        return [rank.process.pid for rank in self._ranks if rank.process.pid is not None]

    async def close(self) -> None:
        """Ask each process to leave."""
        for rank in self._ranks:
            await asyncio.to_thread(rank.close)
