"""asyncexec itself, on each of its transports."""

import os
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from asyncexec import IntermediateTensors, RankContext, create_executor
from asyncexec.bench.payload import Array, Payload, SchedulerOutput
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


class SleepyStage:
    """Takes its time, and hands a small array on."""

    def __init__(self, context: RankContext, *, seconds: float) -> None:
        self._is_last = context.is_last_stage
        self._seconds = seconds

    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate: IntermediateTensors[Array] | None
    ) -> SchedulerOutput | IntermediateTensors[Array]:
        """One step."""
        time.sleep(self._seconds)
        return scheduler_output if self._is_last else IntermediateTensors({"x": np.zeros(1024, np.uint8)})

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

    @property
    def engine_config(self) -> dict[str, Any]:
        """With the process groups that the other cases do without."""
        options = {name: value for name, value in self.options.items() if name != "backend"}
        return {"transport": self.transport, "options": {self.transport: options}}

    async def start(self) -> None:
        """Start the executor."""
        await self._start(EchoWorker, tensor_parallel_size=self.ranks)

    async def start_pipeline(self, seconds: float) -> None:
        """Start it with a stage on each rank."""
        await self._start(SleepyStage, {"seconds": seconds}, pipeline_parallel_size=self.ranks)

    async def _start(self, worker: type, worker_kwargs: Mapping[str, Any] | None = None, **sizes: int) -> None:
        config = {
            "transport": self.transport,
            "max_concurrent_batches": MAX_IN_FLIGHT,
            "options": {self.transport: self.options},
        }
        self._executor = create_executor(config | sizes, worker, worker_kwargs=worker_kwargs)
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
    options: ClassVar[dict[str, Any]] = {"backend": "none", "num_gpus": 0, "driver": "direct"}


class RayDocumented(RayDirect):
    """The same, driven by what Ray documents."""

    options: ClassVar[dict[str, Any]] = {"backend": "none", "num_gpus": 0, "driver": "documented"}
