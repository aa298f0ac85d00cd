"""What an idle executor on Ray costs, with its graph and after `idle_teardown`: `python benchmarks/ray_idle.py`.

Processor time, user and system, of the driver and all ranks together while nothing is submitted, and the seconds of
the step that compiles the graph again.
"""

import argparse
import asyncio
import os
import time
from typing import Any

from asyncexec import create_executor, run
from asyncexec.bench.payload import scheduler_output
from asyncexec.bench.peers.executors import EchoWorker
from asyncexec.bench.processes import processor_seconds


async def measure(ranks: int, seconds: float) -> list[tuple[str, float]]:
    """Processor seconds per second with the graph and without; seconds of the step that compiles it again."""
    options = {"ray": {"backend": "none", "idle_teardown": seconds + 1}}
    config: dict[str, Any] = {"transport": "ray", "tensor_parallel_size": ranks, "options": options}
    value = scheduler_output(64)
    async with create_executor(config, EchoWorker) as executor:
        pids = [os.getpid(), *await executor.collective_rpc("pid")]

        async def use() -> float:
            before = processor_seconds(pids)
            await asyncio.sleep(seconds)
            return (processor_seconds(pids) - before) / seconds

        async def step() -> float:
            began = time.perf_counter()
            await executor.execute_model(value)
            return time.perf_counter() - began

        await step()
        with_graph = await use()
        await asyncio.sleep(seconds / 2 + 2)
        return [
            ("with its graph, cores", with_graph),
            ("torn down, cores", await use()),
            ("the step that compiles again, s", await step()),
            ("the step after it, s", await step()),
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    for what, figure in run(measure(arguments.ranks, arguments.seconds)):
        print(f"driver and {arguments.ranks} ranks, idle for {arguments.seconds:g} s, {what}: {figure:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
