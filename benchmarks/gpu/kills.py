"""Random ranks killed under load: how soon every future fails, and how soon the GPUs' memory is free again."""

import argparse
import asyncio
import os
import random
import signal
import time
from typing import Any

import pynvml  # type: ignore[import-not-found]

import gpu_workers_bench as workers
from asyncexec import create_executor, run
from rows import row

AT_ONCE = 4
"""Executors on the same GPUs, each with a rank to lose."""


def used_memory() -> list[int]:
    handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
    return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles]


async def kill_one(draw: random.Random, number: int) -> tuple[float, Any]:
    """Seconds until the last future has failed, and the executor, still to be closed."""
    tp, pp = (2, 1) if number % 2 else (1, 2)
    config = {
        "transport": "nccl",
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "max_concurrent_batches": 2,
        "options": {"nccl": {"backend": "nccl"}},
    }
    executor = create_executor(config, workers.Victim)
    await executor.start()
    pids = await executor.collective_rpc("pid")
    futures = [executor.execute_model(n) for n in range(8)]

    async def load() -> None:
        while executor.failure is None:
            futures.append(executor.execute_model(0))
            await executor.slot()

    loading = asyncio.ensure_future(load())
    await asyncio.sleep(draw.uniform(0.1, 0.6))
    os.kill(pids[draw.randrange(2)], signal.SIGKILL)
    began = time.perf_counter()
    open_futures = [future for future in futures if not future.done()]
    await asyncio.gather(*open_futures, return_exceptions=True)
    await asyncio.gather(loading, return_exceptions=True)
    await asyncio.gather(*futures, return_exceptions=True)
    return time.perf_counter() - began, executor


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    pynvml.nvmlInit()
    draw, failing, freeing, closing, held = random.Random(0), [], [], [], 0
    before = used_memory()
    for first in range(0, kills, AT_ONCE):
        results = await asyncio.gather(*(kill_one(draw, first + n) for n in range(AT_ONCE)))
        failing += [seconds for seconds, _ in results]
        held = max(held, *(now - then for now, then in zip(used_memory(), before, strict=True)))
        began = time.perf_counter()
        await asyncio.gather(*(executor.aclose() for _, executor in results))
        closed = time.perf_counter()
        closing.append(closed - began)
        while any(now - then > 1 << 26 for now, then in zip(used_memory(), before, strict=True)):
            if time.perf_counter() - closed > 20:
                break
            await asyncio.sleep(0.02)
        freeing.append(time.perf_counter() - closed)
    row(
        f"{len(failing)} kills: longest until all futures failed",
        max(failing),
        "s",
        target="<= 1 s",
        met=max(failing) <= 1,
    )
    row("longest aclose of four after that", max(closing), "s")
    row("longest until memory was free after aclose", max(freeing), "s", target="<= 5 s", met=max(freeing) <= 5)


if __name__ == "__main__":
    run(main())
