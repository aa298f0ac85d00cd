"""Ray actor calls: one actor for each rank, the object references awaited."""

import asyncio
import importlib
import os
import time
from collections.abc import Awaitable, Sequence
from typing import Any, ClassVar

from asyncexec.bench.payload import Payload, echo
from asyncexec.bench.peer import MAX_RAY_RANKS, Peer

RAY = {"ray": "pip install 'asyncexec[ray]'"}


class EchoActor:
    """One rank."""

    def step(self, value: Payload) -> Any:
        """One step."""
        return echo(value)

    def stage(self, value: Payload, seconds: float) -> Payload:
        """One step of a pipeline's stage."""
        time.sleep(seconds)
        return value

    def number(self, number: int) -> int:
        """Returns it."""
        return number

    def pid(self) -> int:
        """Of the actor's process."""
        return os.getpid()


class RayPeer(Peer):
    """Actors on the harness's cluster."""

    needs: ClassVar[dict[str, str]] = RAY
    uses_ray = True
    max_ranks = MAX_RAY_RANKS

    async def start(self) -> None:
        """Connect, unless that is done, and create the actors."""
        self.ray: Any = importlib.import_module("ray")
        if not self.ray.is_initialized():
            self.ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
        remote = self.ray.remote(EchoActor)
        self.actors = [remote.remote() for _ in range(self.ranks)]
        await self.pids()

    async def pids(self) -> Sequence[int]:
        """Asked of the actors, once: the threads that run a graph are busy with it."""
        if not hasattr(self, "_pids"):
            self._pids: Sequence[int] = await asyncio.gather(*[actor.pid.remote() for actor in self.actors])
        return self._pids

    async def close(self) -> None:
        """Kill the actors, and disconnect."""
        for actor in self.actors:
            self.ray.kill(actor)
        self.ray.shutdown()


class RayActors(RayPeer):
    """A method call on each actor for each step."""

    def submit(self, value: Payload) -> Awaitable[Any]:
        """Call each actor, and wait for all."""
        return asyncio.gather(*[actor.step.remote(value) for actor in self.actors])

    def call(self, number: int) -> Awaitable[Any]:
        """Another method of each actor."""
        return asyncio.gather(*[actor.number.remote(number) for actor in self.actors])
