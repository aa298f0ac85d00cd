"""The workers that the tests put on ranks: importable there, and each small."""

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

import msgspec
import numpy as np

from asyncexec import DeferredOutput, IntermediateTensors, KVConnectorOutput, ModelOutput, RankContext


class Item(msgspec.Struct):
    number: int
    values: list[float] = []


class EchoWorker:
    """Returns what it is given; with pipeline stages, passes it on as an array first."""

    def __init__(self, context: RankContext, *, greeting: str = "hello") -> None:
        self.context = context
        self.greeting = greeting
        self.steps = 0

    def execute_model(self, scheduler_output: Any, intermediate: IntermediateTensors[Any] | None) -> Any:
        self.steps += 1
        return scheduler_output if self.context.is_last_stage else IntermediateTensors({})

    def sample_tokens(self, bias: int) -> int:
        return self.steps * 100 + bias

    def rank(self) -> int:
        return self.context.rank

    def place(self) -> dict[str, Any]:
        c = self.context
        return {
            "rank": c.rank,
            "local_rank": c.local_rank,
            "world_size": c.world_size,
            "tp": (c.tensor_parallel_rank, c.tensor_parallel_size),
            "pp": (c.pipeline_parallel_rank, c.pipeline_parallel_size),
            "device": c.device,
        }

    def greet(self, name: str, *, loud: bool = False) -> str:
        text = f"{self.greeting}, {name}"
        return text.upper() if loud else text

    def typed(self, item: Item) -> Item:
        return Item(item.number + 1, [*item.values, 0.5])

    def untyped(self, *values, **named):  # type: ignore[no-untyped-def]
        return values, named

    def add_one(self, array: np.ndarray) -> np.ndarray:
        return array + 1

    def double_bytes(self, data: bytes) -> bytes:
        return data * 2

    def fail(self, message: str) -> None:
        raise ValueError(message)

    def fail_at_length(self, length: int) -> None:
        raise ValueError("x" * length)

    def fail_strangely(self) -> None:
        raise ValueError("no surrogates: \ud800")

    def fail_on(self, rank: int) -> int:
        if self.context.rank == rank:
            raise ValueError(f"rank {rank} does not like this")
        return self.context.rank

    def unpicklable(self) -> Any:
        return threading.Lock()

    def exit(self, status: int) -> None:
        os._exit(status)

    def exit_saying(self, words: str) -> None:
        print(words, file=sys.stderr)
        print("for good", end="", file=sys.stderr, flush=True)
        os._exit(1)

    def work(self, seconds: float, marking: bool) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
            if marking:
                self.context.mark_progress()

    def pid(self) -> int:
        return os.getpid()

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)


class SleepyStages:
    """Each pipeline stage takes as long: the sleep stands for a GPU's work."""

    def __init__(self, context: RankContext, *, seconds: float) -> None:
        self.context = context
        self.seconds = seconds

    def execute_model(self, scheduler_output: int, intermediate: IntermediateTensors[int] | None) -> Any:
        time.sleep(self.seconds)
        total = np.array([scheduler_output]) if intermediate is None else intermediate["total"] + scheduler_output
        return int(total[0]) if self.context.is_last_stage else IntermediateTensors({"total": total})


class LargeHop:
    """Hands an array to the next stage that no socket buffer holds."""

    def __init__(self, context: RankContext, *, size: int) -> None:
        self.context = context
        self.array = np.zeros(size)

    def execute_model(self, scheduler_output: int, intermediate: IntermediateTensors[Any] | None) -> Any:
        if intermediate is not None:
            return float(intermediate["a"].sum())
        self.array[:] = scheduler_output  # the same memory in every step
        return IntermediateTensors({"a": self.array})


class FussyStages:
    """The stage that the scheduler output names raises; every other passes on."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def execute_model(self, scheduler_output: int | None, intermediate: IntermediateTensors[Any] | None) -> Any:
        if scheduler_output == self.context.pipeline_parallel_rank:
            raise RuntimeError(f"stage {scheduler_output} fails")
        if self.context.is_last_stage:
            return "fine"
        return IntermediateTensors({}, output="passed on")


class WrongStage:
    """Returns a plain value from a stage that is not the last."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def execute_model(self, scheduler_output: Any, intermediate: Any) -> Any:
        return scheduler_output


class Later(DeferredOutput[int]):
    """Is there once the event that it waits for is set."""

    def __init__(self, value: int, ready: threading.Event) -> None:
        self.value = value
        self.ready = ready

    def wait(self) -> int:
        self.ready.wait()
        if self.value < 0:
            raise ValueError(f"{self.value} went wrong late")
        return self.value


class DeferringWorker:
    """Its outputs are not there before `release` has run: the main thread must go on meanwhile."""

    def __init__(self, context: RankContext) -> None:
        self.ready = threading.Event()
        self.started: list[int] = []

    def execute_model(self, scheduler_output: int, intermediate: None) -> DeferredOutput[int]:
        self.started.append(scheduler_output)
        if len(self.started) == 2:
            self.ready.set()
        return Later(scheduler_output, self.ready)


class ReadyOnRankZero:
    """The outputs of other ranks, which nobody wants, are never there."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def execute_model(self, scheduler_output: int, intermediate: None) -> DeferredOutput[int]:
        ready = threading.Event()
        if self.context.rank == 0:
            ready.set()
        return Later(scheduler_output, ready)


class FailsToStart:
    def __init__(self, context: RankContext, *, rank: int) -> None:
        if context.rank == rank:
            raise RuntimeError(f"no luck on rank {rank}")


class ExitsAtStart:
    def __init__(self, context: RankContext, *, rank: int) -> None:
        if context.rank == rank:
            os._exit(17)
        threading.Event().wait()


class SumWorker:
    """Sums over its process groups."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def sum_without(self, culprit: int) -> None:
        import torch
        import torch.distributed as dist

        if self.context.rank != culprit:
            dist.all_reduce(torch.tensor(1))

    def join_late(self) -> None:
        self.sum_without(-1)

    def sum_without_dying(self, culprit: int) -> None:
        if self.context.rank == culprit:
            os.kill(os.getpid(), signal.SIGKILL)
        self.sum_without(culprit)

    def bad_collective(self) -> None:
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.ones(2), op=None)

    def sums(self) -> tuple[int, int]:
        import torch
        import torch.distributed as dist

        mine = [torch.tensor(self.context.rank) for _ in range(2)]
        dist.all_reduce(mine[0], group=self.context.groups.world)
        if self.context.groups.tensor_parallel is not None:
            dist.all_reduce(mine[1], group=self.context.groups.tensor_parallel)
        return int(mine[0]), int(mine[1])

    def execute_model(self, scheduler_output: Any, intermediate: Any) -> Any:
        return None


class RankTrail:
    """Collects the ranks that a step's tensors went through."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def execute_model(self, scheduler_output: Any, intermediate: IntermediateTensors[Any] | None) -> Any:
        trail = [] if intermediate is None else intermediate["trail"].tolist()
        trail.append(self.context.rank)
        return trail if self.context.is_last_stage else IntermediateTensors({"trail": np.array(trail)})


class HandsOn:
    """Hands one value on to the last stage, which returns its first item."""

    def __init__(self, context: RankContext, *, value: Any) -> None:
        self.context = context
        self.value = value

    def execute_model(self, scheduler_output: Any, intermediate: IntermediateTensors[Any] | None) -> Any:
        return IntermediateTensors({"x": self.value}) if intermediate is None else float(intermediate["x"][0])


def close_sockets(worker: Any) -> None:
    """Breaks the rank's connections and goes on."""
    for name in os.listdir("/proc/self/fd"):
        if os.path.exists(f"/proc/self/fd/{name}") and os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
            socket.socket(fileno=os.dup(int(name))).shutdown(socket.SHUT_RDWR)
    threading.Event().wait()


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Broken(DeferredOutput[str]):
    def __init__(self, how: str) -> None:
        self.how = how

    def wait(self) -> str:
        if self.how == "exit":
            raise SystemExit(3)
        if self.how == "mute":
            raise Mute
        return self.how


class FailingLater:
    def __init__(self, context: RankContext) -> None:
        pass

    def execute_model(self, scheduler_output: str, intermediate: None) -> DeferredOutput[str]:
        return Broken(scheduler_output)


class LateFailure:
    """Its second rank fails when the first has replied long ago."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def execute_model(self, scheduler_output: int, intermediate: None) -> int:
        if self.context.rank == 1:
            time.sleep(0.1)
            raise ValueError("too late")
        return scheduler_output

    def rank(self) -> int:
        return self.context.rank


class Movable:
    """Takes a new place when asked to, or refuses it."""

    def __init__(
        self,
        context: RankContext,
        *,
        refuses: tuple[int, int] = (-1, -1),
        for_good: bool = False,
        dies: int = -1,
        slow: float = 0.0,
    ) -> None:
        self.refuses, self.for_good, self.slow = refuses, for_good, slow
        self.moved = 0
        if context.rank == dies:
            os._exit(9)
        self._place(context)

    def reinitialize_distributed(self, context: RankContext) -> None:
        time.sleep(self.slow)
        self._place(context)
        self.moved += 1

    def _place(self, context: RankContext) -> None:
        rank, world_size = self.refuses
        if context.rank == rank and context.world_size == world_size:
            if self.for_good:
                self.refuses = rank, context.world_size - 1
            raise LookupError("this rank refuses")
        self.context = context

    def execute_model(self, scheduler_output: int, intermediate: IntermediateTensors[Any] | None) -> Any:
        if intermediate is not None:
            scheduler_output = int(intermediate["sum"][0]) + self.context.pipeline_parallel_rank * 10
        if self.context.is_last_stage:
            return scheduler_output
        return IntermediateTensors({"sum": np.array([scheduler_output])})

    def place(self) -> dict[str, int]:
        context = self.context
        return {
            "tp": context.tensor_parallel_rank,
            "pp": context.pipeline_parallel_rank,
            "world": context.world_size,
        }

    def moves(self) -> int:
        return self.moved

    def pid(self) -> int:
        return os.getpid()

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)


class MovableSum(Movable):
    """Adds up over its group."""

    def total(self) -> int:
        import torch
        import torch.distributed as dist

        value = torch.tensor(self.context.rank + 1)
        dist.all_reduce(value, group=self.context.groups.tensor_parallel)
        return int(value)


class Sender:
    """The ranks of the scheduler output report a request sent."""

    def __init__(self, context: RankContext) -> None:
        self.rank = context.rank

    def execute_model(self, scheduler_output: list[int], intermediate: None) -> ModelOutput:
        if self.rank not in scheduler_output:
            return ModelOutput()
        return ModelOutput(kv_connector_output=KVConnectorOutput(finished_sending={"request"}))


class StagedSender(Sender):
    """The same on several pipeline stages."""

    def __init__(self, context: RankContext) -> None:
        super().__init__(context)
        self.is_last_stage = context.is_last_stage

    def execute_model(self, scheduler_output: list[int], intermediate: Any) -> Any:
        output = super().execute_model(scheduler_output, None)
        return output if self.is_last_stage else IntermediateTensors({}, output)
