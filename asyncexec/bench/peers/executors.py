"""asyncexec itself, on each of its transports."""

import os
from collections.abc import Awaitable, Sequence
from typing import Any, ClassVar

import numpy as np

from asyncexec import create_executor
from asyncexec.bench.payload import Payload, SchedulerOutput
from asyncexec.bench.peer import MAX_IN_FLIGHT, MAX_RAY_RANKS, Peer
from asyncexec.registry import list_transports


class EchoWorker:
    """Returns what it is given."""

    def __init__(self, context: Any) -> None:
        pass

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate: None) -> SchedulerOutput:
        """One step."""
        return scheduler_output

    def sample_tokens(self, array: np.ndarray) -> int:
        """A step with an array."""
        return array.nbytes

    def number(self, number: int) -> int:
        """Returns it."""
        return number

    def pid(self) -> int:
        """Of the rank's process."""
        return os.getpid()


class AsyncExec(Peer):
    """An executor of one transport; only the first rank replies, as is the default.

    Attributes:
        transport: its name.
        options: the transport's.
    """

    transport: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    @classmethod
    def unavailable(cls) -> str | None:
        """What the transport says."""
        reasons = {info.name: info.unavailable for info in list_transports()}
        return reasons.get(cls.transport, f"no transport {cls.transport!r} is installed")

    async def start(self) -> None:
        """Start the executor."""
        config = {
            "transport": self.transport,
            "tensor_parallel_size": self.ranks,
            "max_concurrent_batches": MAX_IN_FLIGHT,
            "options": {self.transport: self.options} if self.options else {},
        }
        self._executor = create_executor(config, EchoWorker)
        await self._executor.start()

    def submit(self, value: Payload) -> Awaitable[Any]:
        """One step."""
        if isinstance(value, np.ndarray):
            return self._executor.sample_tokens(value)
        return self._executor.execute_model(value)

    def call(self, number: int) -> Awaitable[Any]:
        """A method of every rank."""
        return self._executor.collective_rpc("number", (number,))

    async def pids(self) -> Sequence[int]:
        """Asked of the ranks."""
        return [pid for pid in await self._executor.collective_rpc("pid") if pid != os.getpid()]

    async def close(self) -> None:
        """The graceful end."""
        await self._executor.aclose()


class Local(AsyncExec):
    """One rank on a thread."""

    transport = "local"
    max_ranks = 1


class Nccl(AsyncExec):
    """A process per rank, without process groups."""

    transport = "nccl"
    options: ClassVar[dict[str, Any]] = {"backend": "none"}


class RayDirect(AsyncExec):
    """A Ray actor per rank, the graph driven directly."""

    transport = "ray"
    uses_ray = True
    max_ranks = MAX_RAY_RANKS
    options: ClassVar[dict[str, Any]] = {"backend": "none", "driver": "direct"}


class RayDocumented(RayDirect):
    """The same, driven by what Ray documents."""

    options: ClassVar[dict[str, Any]] = {"backend": "none", "driver": "documented"}
