"""The same two-stage step on Ray alone: a compiled graph whose tensor goes through its NCCL channel."""

import asyncio
import logging
import time
from typing import Any

import ray
import torch
from ray.dag import InputNode

from rows import microseconds, row


class Stage:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.tensor: Any = None

    def first(self, tokens: list[int]) -> Any:
        if self.tensor is None:  # the graph runs on another thread, whose device is set there
            self.tensor = torch.zeros(self.nbytes // 2, dtype=torch.bfloat16, device="cuda")
        return self.tensor

    def last(self, tensor: Any) -> list[float]:
        result: list[float] = tensor[:64].tolist()
        return result


def graph(nbytes: int, *, awaited: bool) -> Any:
    actor: Any = ray.remote(num_gpus=1)(Stage)
    first, last = actor.remote(nbytes), actor.remote(nbytes)
    with InputNode() as tokens:
        between = first.first.bind(tokens).with_tensor_transport(transport="nccl")
        output = last.last.bind(between)
    return output.experimental_compile(enable_asyncio=awaited)


def synchronous(compiled: Any, count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        ray.get(compiled.execute(list(range(64))))
        times.append(time.perf_counter() - began)
    return times


async def awaited(count: int) -> list[float]:
    compiled = graph(1 << 20, awaited=True)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        await (await compiled.execute_async(list(range(64))))
        times.append(time.perf_counter() - began)
    compiled.teardown(kill_actors=True)
    return times


def main() -> None:
    ray.init(num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    compiled = graph(1 << 20, awaited=False)
    times = microseconds(synchronous(compiled, 700)[200:])
    row(
        "Ray's compiled graph, two stages, 1 MiB by its NCCL channel, synchronous", times["p50"], "us", p99=times["p99"]
    )
    compiled.teardown(kill_actors=True)
    time.sleep(2)  # Ray frees the actors' GPUs when it notices
    times = microseconds(asyncio.run(awaited(700))[200:])
    row("Ray's compiled graph, two stages, 1 MiB by its NCCL channel, awaited", times["p50"], "us", p99=times["p99"])
    ray.shutdown()


if __name__ == "__main__":
    main()
