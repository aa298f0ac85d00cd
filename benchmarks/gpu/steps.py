"""An awaited step of two stages with a tensor between two GPUs; steps in flight of stages that are busy."""

import asyncio
import statistics
import time
from typing import Any

import torch

import gpu_workers_bench as workers
from asyncexec import create_executor, run
from rows import microseconds, row

TOKENS = list(range(64))


def two_stages(**config: Any) -> dict[str, Any]:
    return {"transport": "nccl", "pipeline_parallel_size": 2, "options": {"nccl": {"backend": "nccl"}}} | config


async def step(worker: type, kwargs: dict[str, Any], **config: Any) -> dict[str, Any]:
    """Microseconds of an awaited step, one at a time, and where they went."""
    async with create_executor(two_stages(**config), worker, worker_kwargs=kwargs) as executor:
        times, timings = [], []
        for n in range(2500):
            began = time.perf_counter()
            future = executor.execute_model(TOKENS)
            await future
            if n >= 500:
                times.append(time.perf_counter() - began)
                timings.append(future.timing)
        parts = ("queued", "driver", "wire", "worker", "aggregate")
        where = {p: statistics.median(getattr(timing, p) for timing in timings if timing) * 1e6 for p in parts}
        return microseconds(times) | where


async def rate(stages: int, in_flight: int) -> float:
    """Steps per second of stages that are busy for 5 ms each."""
    config = two_stages(pipeline_parallel_size=stages, max_concurrent_batches=in_flight)
    async with create_executor(config, workers.Busy, worker_kwargs={"milliseconds": 5.0}) as executor:
        await asyncio.gather(*(executor.execute_model(n) for n in range(10)))
        began = time.perf_counter()
        for _ in range(4):
            await asyncio.gather(*(executor.execute_model(n) for n in range(50)))
        return 200 / (time.perf_counter() - began)


async def main() -> None:
    none = await step(workers.Nothing, {}, pipeline_parallel_size=1)
    row("awaited step of one rank that does nothing", none.pop("p50"), "us", **none)
    empty = await step(workers.Nothing, {})
    row("awaited two-stage step without a tensor", empty.pop("p50"), "us", **empty)
    for deferred in (False, True):
        times = await step(workers.Hop, {"nbytes": 1 << 20, "deferred": deferred})
        how = "deferred output" if deferred else "output waited for"
        p50 = times.pop("p50")
        row(f"awaited two-stage step, 1 MiB, {how}", p50, "us", target="<= 120 us", met=p50 <= 120, **times)
    for stages, target in ((2, 1.9), (4, 3.6)):
        if torch.cuda.device_count() >= stages:
            one, all_ = await rate(stages, 1), await rate(stages, stages)
            row(f"{stages} stages of 5 ms, one in flight", one, "steps/s")
            row(f"{stages} stages of 5 ms, {stages} in flight", all_, "steps/s")
            ratio = all_ / one
            row(f"{stages} in flight over one", ratio, "x", target=f">= {target} x", met=ratio >= target)


if __name__ == "__main__":
    run(main())
