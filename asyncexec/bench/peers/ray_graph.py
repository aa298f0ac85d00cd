"""Ray compiled graphs, as Ray documents them: blocking, and awaited."""

import asyncio
import functools
import importlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

from asyncexec.bench.payload import Payload
from asyncexec.bench.peer import MAX_IN_FLIGHT
from asyncexec.bench.peers.ray_actors import RayPeer

_LIMIT = 120
"""Seconds of Ray's limits, which are 10: they run on while a peer is stopped and the others have their turns."""


class RayGraph(RayPeer):
    """`ray.get(graph.execute(...))`: it blocks the event loop until the answer is there.

    Attributes:
        awaited: whether the graph is compiled with `enable_asyncio`.
    """

    awaited: ClassVar[bool] = False
    tensors = False  # each would have Ray make its buffers larger, step after step

    async def start(self) -> None:
        """Create the actors and compile."""
        await super().start()
        self._compile(lambda value: [actor.step.bind(value) for actor in self.actors])

    async def start_pipeline(self, seconds: float) -> None:
        """A graph that goes from actor to actor."""
        await super().start()
        self._compile(lambda value: [functools.reduce(lambda node, a: a.stage.bind(node, seconds), self.actors, value)])

    def _compile(self, outputs_of: Callable[[Any], Sequence[Any]]) -> None:
        dag: Any = importlib.import_module("ray.dag")
        limits: Any = importlib.import_module("ray.dag.context").DAGContext.get_current()
        limits.submit_timeout = limits.get_timeout = _LIMIT
        with dag.InputNode() as value:
            outputs = dag.MultiOutputNode(outputs_of(value))
        self._graph = outputs.experimental_compile(
            enable_asyncio=self.awaited, _max_inflight_executions=MAX_IN_FLIGHT + 1
        )

    def submit(self, value: Payload) -> Awaitable[Any]:
        """Write the input; awaiting the answer blocks."""
        return self._wait(self._graph.execute(value))

    async def _wait(self, references: Any) -> Any:
        return self.ray.get(references)

    async def close(self) -> None:
        """Tear the graph down first."""
        await asyncio.to_thread(self._graph.teardown)
        await super().close()


class RayGraphAwaited(RayGraph):
    """`await graph.execute_async(...)`, and each of its futures by itself, in order."""

    awaited = True

    def submit(self, value: Payload) -> Awaitable[Any]:
        """A task, so that it starts without being awaited."""
        return asyncio.ensure_future(self._step(value))

    async def _step(self, value: Payload) -> Any:
        return [await output for output in await self._graph.execute_async(value)]
