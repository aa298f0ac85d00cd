"""The workers that the GPU benchmark puts on ranks."""

import os
from typing import Any

import torch
import torch.distributed as dist

from asyncexec import HostCopier, IntermediateTensors, RankContext
from asyncexec.demo.messages import StepInput
from asyncexec.demo.worker import ModelWorker

# torch's own hints leave these out
cuda: Any = torch.cuda
autograd: Any = torch.autograd


class Weights:
    """Holds weights on its GPU, and takes new ones."""

    def __init__(self, context: RankContext, *, tensors: int, nbytes: int) -> None:
        self.device = context.device
        self.weights = {
            f"layer {n}": torch.zeros(nbytes // 2, dtype=torch.int16, device=context.device) for n in range(tensors)
        }

    def execute_model(self, scheduler_output: Any, intermediate: Any) -> Any:
        return None

    def load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in named_tensors.items():
            self.weights[name].copy_(tensor)

    def sum_of(self, name: str) -> int:
        return int(self.weights[name].long().sum().item())

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def pinned_rate(self) -> float:
        """Bytes per second of copies of 64 MiB from pinned memory to this GPU, the median of 30."""
        host = torch.ones(64 << 20, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(64 << 20, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(30):
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record()
            there.copy_(host, non_blocking=True)
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) / 1e3)
        return (64 << 20) / sorted(times)[15]


class Nothing:
    """Does nothing."""

    def __init__(self, context: RankContext) -> None:
        self.last = context.is_last_stage

    def execute_model(self, scheduler_output: list[int], intermediate: Any) -> Any:
        return scheduler_output if self.last else IntermediateTensors({})


class Hop:
    """Two stages and one tensor between them; the last stage copies 64 tokens back.

    Args:
        context: this rank's place.
        nbytes: of the tensor.
        deferred: whether the output is deferred; else the main thread waits for it.
    """

    def __init__(self, context: RankContext, *, nbytes: int, deferred: bool) -> None:
        self.last = context.is_last_stage
        self.tensor = torch.zeros(nbytes // 2, dtype=torch.bfloat16, device=context.device)
        self.copies = HostCopier(context.device)
        self.deferred = deferred

    def execute_model(self, scheduler_output: list[int], intermediate: Any) -> Any:
        if intermediate is None:
            return IntermediateTensors({"hidden_states": self.tensor})
        tokens = intermediate["hidden_states"][:64]
        return self.copies.to_host([tokens], _first) if self.deferred else tokens.tolist()


class Busy:
    """Stages that keep their GPUs busy for some time each."""

    def __init__(self, context: RankContext, *, milliseconds: float) -> None:
        self.last = context.is_last_stage
        self.device = context.device
        self.copies = HostCopier(context.device)
        self.cycles = int(milliseconds * cycles_per_millisecond())

    def execute_model(self, scheduler_output: int, intermediate: Any) -> Any:
        tensor = intermediate["tensor"] if intermediate else torch.zeros(1 << 19, device=self.device)
        cuda._sleep(self.cycles)
        if not self.last:
            return IntermediateTensors({"tensor": tensor})
        return self.copies.to_host([tensor[:64]], _first)


def cycles_per_millisecond() -> float:
    """What `cuda._sleep` counts on this GPU."""
    cycles = 20_000_000
    for _ in range(3):
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record()
        cuda._sleep(cycles)
        end.record()
        end.synchronize()
    return float(cycles / begin.elapsed_time(end))


def _first(copies: list[torch.Tensor]) -> list[float]:
    result: list[float] = copies[0].tolist()
    return result


class TimedModelWorker(ModelWorker):
    """The demo's worker, with events around each step and, on demand, every kernel's times."""

    def __init__(self, context: RankContext, **kwargs: Any) -> None:
        super().__init__(context, **kwargs)
        self._steps: list[tuple[Any, Any]] = []
        self._profiler: Any = None

    def execute_model(self, scheduler_output: StepInput, intermediate: Any) -> Any:
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        begin.record()
        output = super().execute_model(scheduler_output, intermediate)
        end.record()
        self._steps.append((begin, end))
        return output

    def forget_steps(self) -> None:
        self._steps.clear()

    def timeline(self) -> list[tuple[float, float]]:
        """Begin and end of each step on the GPU, in milliseconds after the first began."""
        torch.cuda.synchronize()
        first = self._steps[0][0]
        return [(first.elapsed_time(begin), first.elapsed_time(end)) for begin, end in self._steps]

    def start_profiler(self) -> None:
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profiler.__enter__()

    def busy_share(self) -> tuple[float, int]:
        """The share of the time between the first kernel's begin and the last one's end in which any ran; how many."""
        torch.cuda.synchronize()
        self._profiler.__exit__(None, None, None)
        events = self._profiler.profiler.kineto_results.events()
        spans = sorted(
            (event.start_ns(), event.start_ns() + event.duration_ns())
            for event in events
            if event.device_type() == autograd.DeviceType.CUDA and event.duration_ns() > 0
        )
        busy, until = 0, spans[0][0]
        for begin, end in spans:
            busy += max(0, end - max(begin, until))
            until = max(until, end)
        return busy / (until - spans[0][0]), len(spans)


class Victim:
    """Holds a gibibyte and works: collectives with tensor parallelism, hops with pipeline stages."""

    def __init__(self, context: RankContext) -> None:
        self.context = context
        self.held = torch.ones(1 << 28, device=context.device)
        self.sum = torch.ones(1 << 18, device=context.device)
        self.copies = HostCopier(context.device)

    def pid(self) -> int:
        return os.getpid()

    def execute_model(self, scheduler_output: int, intermediate: Any) -> Any:
        tensor = self.sum if intermediate is None else intermediate["tensor"]
        for _ in range(20):
            if self.context.groups.tensor_parallel is not None:
                dist.all_reduce(self.sum, group=self.context.groups.tensor_parallel)
            cuda._sleep(100_000)
        if not self.context.is_last_stage:
            return IntermediateTensors({"tensor": tensor.clone()})
        return self.copies.to_host([tensor[:4]], _first)
