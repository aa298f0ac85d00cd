"""The workers that the GPU tests put on ranks."""

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from asyncexec import DeferredOutput, HostCopier, IntermediateTensors, RankContext

cuda: Any = torch.cuda  # torch's own hints leave _sleep out
SHAPES = [(3, 5), (1024, 512), (7,), (0, 4), (3, 5), (1, 1, 2), (64, 1024)]


def payload(step: int, device: str) -> dict[str, Any]:
    """Tensors of several dtypes and shapes, some in host memory; what they hold depends on the step."""
    shape = SHAPES[step % len(SHAPES)]
    values = torch.arange(int(np.prod(shape)), device=device).reshape(shape) % 251 + step
    return {
        "floats": values.float(),
        "halves": values.to(torch.bfloat16),
        "turned": values.float().reshape(-1, shape[-1]).t(),
        "scalar": torch.tensor(float(step), device=device),
        "on host": torch.full((2, 3), step),
        "array": np.array([step, step + 1]),
    }


class Courier:
    """The first stage sends; every stage passes on; the last compares with what was to come."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def execute_model(self, scheduler_output: dict[str, Any], intermediate: Any) -> Any:
        step = scheduler_output["step"]
        if scheduler_output.get("fail") == self.context.pipeline_parallel_rank:
            raise ValueError(f"stage {self.context.pipeline_parallel_rank} fails step {step}")
        expected = payload(step, self.context.device)
        if intermediate is not None:
            for name, value in expected.items():
                assert type(intermediate[name]) is type(value), name
                there = value.to(self.context.device) if isinstance(value, torch.Tensor) else value
                assert (intermediate[name] == there).all(), name
                assert intermediate[name].shape == value.shape, name
                assert intermediate[name].dtype == value.dtype, name
                if isinstance(value, torch.Tensor):
                    # what lies in host memory arrives on the device, as without NCCL
                    assert str(intermediate[name].device) == self.context.device, name
        if self.context.is_last_stage:
            return step
        return IntermediateTensors(expected, replicated=frozenset({"floats", "halves"}))

    def device(self) -> str:
        return str(torch.zeros(1, device="cuda").device)


class Racer:
    """Steps whose work on the GPU takes a while: an order that is not kept shows in the sums."""

    def __init__(self, context: RankContext, *, cycles: int = 3_000_000, elements: int = 1 << 20) -> None:
        self.context = context
        self.cycles = cycles
        self.elements = elements
        self.copies = HostCopier(context.device)

    def execute_model(self, scheduler_output: int, intermediate: Any) -> Any:
        if intermediate is None:
            tensor = torch.zeros(self.elements, device=self.context.device)
        else:
            tensor = intermediate["tensor"]
        cuda._sleep(self.cycles)
        tensor += scheduler_output
        if not self.context.is_last_stage:
            return IntermediateTensors({"tensor": tensor})
        ends = torch.stack((tensor.min(), tensor.max()))
        del tensor, intermediate
        torch.full((self.elements,), -1.0, device=self.context.device)  # would take the memory, were it free too early
        return self.copies.to_host([ends], _as_list)


def _as_list(copies: list[torch.Tensor]) -> list[float]:
    return [float(value) for value in copies[0]]


class Holder:
    """Holds memory, and takes part in collectives for as long as it is told."""

    def __init__(self, context: RankContext, *, gib: float = 1.0) -> None:
        self.context = context
        self.held = torch.ones(int(gib * (1 << 30)) // 4, device=context.device)
        self.sum = torch.ones(1 << 20, device=context.device)

    def pid(self) -> int:
        return os.getpid()

    def execute_model(self, scheduler_output: float, intermediate: Any) -> Any:
        if self.context.pipeline_parallel_size > 1:
            tensor = self.sum.clone() if intermediate is None else intermediate["tensor"]
            time.sleep(scheduler_output)
            if not self.context.is_last_stage:
                return IntermediateTensors({"tensor": tensor})
            return float(tensor[0])
        end = time.monotonic() + scheduler_output
        while True:
            # all agree on when to end: the clock of the first decides
            more = torch.full((1,), float(time.monotonic() < end), device=self.context.device)
            dist.broadcast(more, 0, group=self.context.groups.world)
            dist.all_reduce(self.sum, group=self.context.groups.world)
            if not more.item():
                return 1.0

    def wait_alone(self) -> None:
        """One rank enters a collective that the others never will; its host thread waits for the GPU."""
        if self.context.rank == 0:
            dist.all_reduce(self.sum, group=self.context.groups.world)
            torch.cuda.synchronize()

    def enqueue_alone(self) -> None:
        """As above, and the rank goes on: the collective is left behind on its GPU."""
        if self.context.rank == 0:
            dist.all_reduce(self.sum, group=self.context.groups.world)

    def kill_soon(self, rank: int, seconds: float) -> None:
        if self.context.rank == rank:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


class Receiver:
    """Keeps what it is handed."""

    def __init__(self, context: RankContext) -> None:
        self.device = context.device
        self.weights: dict[str, torch.Tensor] = {}

    def execute_model(self, scheduler_output: Any, intermediate: Any) -> None:
        return None

    def load_weights(self, named_tensors: dict[str, torch.Tensor]) -> None:
        assert all(str(tensor.device) == self.device for tensor in named_tensors.values())
        cuda._sleep(1_000_000)  # the next bucket must not be there too early
        self.weights |= {name: tensor.clone() for name, tensor in named_tensors.items()}

    def sums(self) -> dict[str, float]:
        return {name: float(tensor.double().sum()) for name, tensor in self.weights.items()}


class Deferring:
    """Returns what it is given, by way of the GPU; may fail while it finishes."""

    def __init__(self, context: RankContext) -> None:
        self.copies = HostCopier(context.device)
        self.device = context.device

    def execute_model(self, scheduler_output: list[int], intermediate: Any) -> DeferredOutput[list[int]]:
        tensor = torch.tensor(scheduler_output, device=self.device)
        cuda._sleep(2_000_000)
        return self.copies.to_host([tensor, tensor * 2], _both if scheduler_output else _fails)


def _both(copies: list[torch.Tensor]) -> list[int]:
    assert all(copy.is_pinned() for copy in copies)
    return [*copies[0].tolist(), *copies[1].tolist()]


def _fails(copies: list[torch.Tensor]) -> list[int]:
    raise ValueError("nothing to finish")


class Placed:
    """Says where its argument's tensors are, and what they hold."""

    def __init__(self, context: RankContext) -> None:
        self.context = context

    def execute_model(self, scheduler_output: list[Any], intermediate: Any) -> list[tuple[bool, float]]:
        return [
            (isinstance(value, torch.Tensor) and str(value.device) == self.context.device, float(value.sum()))
            for value in scheduler_output
        ]

    def rpc(self, values: list[Any]) -> list[tuple[bool, float]]:
        return self.execute_model(values, None)
