"""What a large argument costs, and what a rank more costs: `python benchmarks/large_payloads.py`.

Both on transport `nccl`, whose ranks here make no process groups.  Everything of one table is measured in turns in one
run, so that machines compare:

- a step with a tensor, awaited until every rank has it: through shared memory, and over the sockets alone; an empty
  step, which is the floor; and one copy of the tensor's memory (memcpy, source and target touched before), as each rank
  has to make at least.  Ratios of the first: to one copy per rank, one after the other, plus the floor; to a single
  copy plus the floor, which takes a core per rank and one for the driver; to the step over the sockets.
- an empty step to 1, 2, 4 and 8 ranks, of which one answers or all do, its slope by least squares, and how much of it
  is the driver's own CPU time.
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch

from asyncexec import Executor, create_executor, run

RANKS = (1, 2, 4, 8)


class Worker:
    """Takes a tensor or nothing, and says how many bytes came."""

    def __init__(self, context: Any) -> None:
        pass

    def execute_model(self, scheduler_output: Any, intermediate: None) -> int:
        return 0 if scheduler_output is None else int(scheduler_output.nbytes)


def quiet(worker: Worker) -> None:
    """Does nothing, behind what was sent before."""


def executor_of(ranks: int, aggregator: str, **options: Any) -> Executor:
    sizes = {"tensor_parallel_size": ranks, "aggregator": aggregator}
    return create_executor({"transport": "nccl", "options": {"nccl": {"backend": "none"} | options}} | sizes, Worker)


async def timed(step: Callable[[], Awaitable[Any]], expected: Any) -> float:
    """Microseconds of one awaited step."""
    began = time.perf_counter_ns()
    if await step() != expected:
        raise SystemExit("BROKEN: the tensor did not arrive")
    return (time.perf_counter_ns() - began) / 1e3


def copied(source: memoryview, target: memoryview) -> float:
    """Microseconds of one copy."""
    began = time.perf_counter_ns()
    target[:] = source
    return (time.perf_counter_ns() - began) / 1e3


async def measure_payload(ranks: int, nbytes: int, rounds: int) -> None:
    tensor = torch.arange(nbytes // 4, dtype=torch.int32)
    memory: Any = tensor.numpy()
    source, target = memoryview(memory).cast("B"), memoryview(bytearray(nbytes))
    large, beside, empty, copy = [], [], [], []
    async with executor_of(ranks, "all") as executor, executor_of(ranks, "all", shared_memory_bytes=0) as by_socket:
        for _ in range(rounds):
            large.append(await timed(lambda: executor.execute_model(tensor), [nbytes] * ranks))
            empty.append(await timed(lambda: executor.execute_model(None), [0] * ranks))
            beside.append(await timed(lambda: by_socket.execute_model(tensor), [nbytes] * ranks))
            copy.append(copied(source, target))
    step, sockets, floor, memcpy = (statistics.median(samples) for samples in (large, beside, empty, copy))
    print(
        f"  {nbytes / 2**20:10.4g} {step:10.0f} {sockets:10.0f} {floor:10.0f} {memcpy:10.0f}"
        f" {step / (ranks * memcpy + floor):14.2f} {step / (memcpy + floor):10.2f} {step / sockets:10.2f}"
    )


async def measure_slope(rounds: int, burst: int, aggregator: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        executors = {ranks: await stack.enter_async_context(executor_of(ranks, aggregator)) for ranks in RANKS}
        wall: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
        driver: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
        for _ in range(rounds):
            for ranks, executor in executors.items():
                began, cpu = time.perf_counter_ns(), time.thread_time_ns()
                for _ in range(burst):
                    await executor.execute_model(None)
                wall[ranks].append((time.perf_counter_ns() - began) / burst / 1e3)
                driver[ranks].append((time.thread_time_ns() - cpu) / burst / 1e3)
                await executor.collective_rpc(quiet)  # until the last rank is done
    for name, samples in ((f"answers: {aggregator}", wall), ("  driver's CPU", driver)):
        medians = [statistics.median(samples[ranks]) for ranks in RANKS]
        slope = statistics.linear_regression(RANKS, medians).slope
        print(f"  {name:15}" + "".join(f"{median:9.0f}" for median in medians) + f" {slope:9.1f}")


async def measure(arguments: argparse.Namespace) -> None:
    print(f"{os.cpu_count()} cores; medians of {arguments.rounds} rounds, us")
    print(f"a step with a tensor to {arguments.ranks} ranks                              step over")
    print(
        f"  {'MiB':>10} {'step':>10} {'sockets':>10} {'empty':>10} {'memcpy':>10}"
        f" {'copies + empty':>14} {'one + empty':>11} {'sockets':>9}"
    )
    for mebibytes in arguments.mebibytes:
        await measure_payload(arguments.ranks, int(mebibytes * 2**20), arguments.rounds)
    print("an empty step    " + "".join(f"{ranks:3} ranks" for ranks in RANKS) + "   us/rank")
    for aggregator in ("first", "all"):
        await measure_slope(arguments.rounds, 50, aggregator)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=4, help="of the first table")
    parser.add_argument("--mebibytes", type=float, nargs="+", default=[0.0625, 0.25, 1, 4, 16, 64])
    run(measure(parser.parse_args(arguments)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
