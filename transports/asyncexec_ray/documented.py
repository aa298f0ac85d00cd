"""Driving a compiled graph by what Ray documents: `execute_async`, and its futures awaited in order."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from asyncexec_ray.graph_internals import Deliver, end_graph, quieten_ray


class DocumentedDriver:
    """A compiled graph, and two tasks that are never cancelled while it is used.

    One submits, one awaits: in order, each future once, and nobody else gets to see them.  So nothing of what makes
    these futures fragile can happen: a dropped, cancelled or doubly awaited one.

    Args:
        graph: compiled with `enable_asyncio=True` inside the running loop.
        deliver: see `Deliver`.
        failed: called when the graph ended by itself.
    """

    def __init__(self, graph: Any, deliver: Deliver, failed: Callable[[BaseException], None]) -> None:
        quieten_ray()
        self._graph = graph
        self._deliver = deliver
        self._failed = failed
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._steps: asyncio.Queue[list[Any] | None] = asyncio.Queue()
        self._closing = False
        self._tasks = [asyncio.create_task(self._submit()), asyncio.create_task(self._receive())]

    def send(self, message: bytes) -> None:
        """Start a step."""
        self._messages.put_nowait(message)

    async def close(self) -> None:
        """End the graph; what is in flight still is given up."""
        self._closing = True
        self._messages.put_nowait(None)
        self._steps.put_nowait(None)
        await asyncio.to_thread(end_graph, self._graph)
        for task in self._tasks:
            task.cancel()  # the graph is gone: nothing can be harmed any more
        await asyncio.wait(self._tasks)

    async def _submit(self) -> None:
        with self._reporting():
            while (message := await self._messages.get()) is not None:
                self._steps.put_nowait(await self._graph.execute_async(message))

    async def _receive(self) -> None:
        with self._reporting():
            while (step := await self._steps.get()) is not None:
                for index, output in enumerate(step):
                    self._deliver(index, await output, index == len(step) - 1)

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - of a graph whose actors are gone, Ray raises all sorts
            if not self._closing:
                self._failed(error)
