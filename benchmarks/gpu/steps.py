"""An awaited step of two stages with a tensor between two GPUs; steps in flight of stages that are busy."""

import asyncio
import time
from typing import Any

import gpu_workers_bench as workers
from asyncexec import create_executor, run
from rows import microseconds, row

TOKENS = list(range(64))


def two_stages(**config: Any) -> dict[str, Any]:
    return {"transport": "nccl", "pipeline_parallel_size": 2, "options": {"nccl": {"backend": "nccl"}}} | config


async def step(nbytes: int, deferred: bool) -> dict[str, float]:
    """Microseconds of an awaited step, one at a time."""
    kwargs = {"nbytes": nbytes, "deferred": deferred}
    async with create_executor(two_stages(), workers.Hop, worker_kwargs=kwargs) as executor:
        times = []
        for n in range(2500):
            began = time.perf_counter()
            await executor.execute_model(TOKENS)
            if n >= 500:
                times.append(time.perf_counter() - began)
        return microseconds(times)


async def rate(in_flight: int) -> float:
    """Steps per second of two stages that are busy for 5 ms each."""
    config = two_stages(max_concurrent_batches=in_flight)
    async with create_executor(config, workers.Busy, worker_kwargs={"milliseconds": 5.0}) as executor:
        await asyncio.gather(*(executor.execute_model(n) for n in range(10)))
        began = time.perf_counter()
        for _ in range(4):
            await asyncio.gather(*(executor.execute_model(n) for n in range(50)))
        return 200 / (time.perf_counter() - began)


async def main() -> None:
    for nbytes, size in ((1 << 20, "1 MiB"), (64, "64 B")):
        for deferred in (False, True):
            times = await step(nbytes, deferred)
            how = "deferred output" if deferred else "output waited for"
            target = {"target": "<= 120 us", "met": times["p50"] <= 120} if size == "1 MiB" else {}
            row(f"awaited two-stage step, {size}, {how}", times["p50"], "us", p99=times["p99"], **target)
    one, two = await rate(1), await rate(2)
    row("two 5 ms stages, one in flight", one, "steps/s")
    row("two 5 ms stages, two in flight", two, "steps/s")
    row("two in flight over one", two / one, "x", target=">= 1.9 x", met=two / one >= 1.9)


if __name__ == "__main__":
    run(main())
