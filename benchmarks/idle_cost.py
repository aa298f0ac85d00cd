"""What an idle executor costs: `python benchmarks/idle_cost.py`.

Processor time, user and system, of the driver and all ranks together while nothing is submitted, from /proc.
"""

import argparse
import asyncio
import os
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    used = run(measure(arguments.ranks, arguments.seconds))
    print(f"driver and {arguments.ranks} ranks, idle for {arguments.seconds:g} s: {used:.4%} of one core")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
