"""What an idle executor costs: `python benchmarks/idle_cost.py [--transport ray]`.

Processor time, user and system, of the driver and all ranks together while nothing is submitted, from /proc.
"""

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

from asyncexec import create_executor, run


class IdleWorker:
    """Does nothing; has joined its process groups."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def execute_model(self, scheduler_output: int, intermediate: None) -> int:
        return scheduler_output

    def pid(self) -> int:
        return os.getpid()


def processor_seconds(pid: int) -> float:
    """User and system time that a process has used so far."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def measure(ranks: int, seconds: float) -> float:
    """Processor seconds per second."""
    async with create_executor({"transport": "nccl", "tensor_parallel_size": ranks}, IdleWorker) as executor:
        pids = [os.getpid(), *await executor.collective_rpc("pid")]
        await executor.execute_model(1)
        before = sum(map(processor_seconds, pids))
        await asyncio.sleep(seconds)
        return (sum(map(processor_seconds, pids)) - before) / seconds


async def measure_ray(ranks: int, seconds: float) -> list[tuple[str, float]]:
    """On Ray: processor seconds per second with the graph and without; seconds of the step that compiles it again."""
    options = {"ray": {"backend": "none", "idle_teardown": seconds + 1}}
    config = {"transport": "ray", "tensor_parallel_size": ranks, "options": options}
    async with create_executor(config, IdleWorker) as executor:
        pids = [os.getpid(), *await executor.collective_rpc("pid")]

        async def use() -> float:
            before = sum(map(processor_seconds, pids))
            await asyncio.sleep(seconds)
            return (sum(map(processor_seconds, pids)) - before) / seconds

        await executor.execute_model(1)
        with_graph = await use()
        await asyncio.sleep(seconds / 2 + 2)
        without = await use()
        began = time.perf_counter()
        await executor.execute_model(1)
        again = time.perf_counter() - began
        began = time.perf_counter()
        await executor.execute_model(1)
        return [
            ("with its graph, cores", with_graph),
            ("torn down, cores", without),
            ("the step that compiles again, s", again),
            ("the step after it, s", time.perf_counter() - began),
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--transport", choices=("nccl", "ray"), default="nccl")
    arguments = parser.parse_args()
    who = f"driver and {arguments.ranks} ranks, idle for {arguments.seconds:g} s"
    if arguments.transport == "ray":
        for what, figure in run(measure_ray(arguments.ranks, arguments.seconds)):
            print(f"{who}, {what}: {figure:.4f}")
        return 0
    used = run(measure(arguments.ranks, arguments.seconds))
    print(f"{who}: {used:.4%} of one core")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
