"""An awaited step on the `ray` transport beside Ray's own compiled graphs: `python benchmarks/ray_step.py`.

Four ways to have 1 or 2 actors echo a byte string of 16 bytes or 10 KB, one step at a time: through asyncexec, on its
direct and on its documented path; Ray's own `await graph.execute_async(...)`; and Ray's blocking
`ray.get(graph.execute(...))`.  Then again with four steps in flight, as steps per second.  They are measured in rounds
that alternate between them, because machines are noisy, and each has the machine to itself, because the readers of an
idle graph take a core each.  The figures are medians, and the ratios are of medians.
"""

import argparse
import asyncio
import collections
import contextlib
import importlib
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from asyncexec import create_executor, run
from asyncexec_ray.cluster import LOCAL_SYSTEM_CONFIG

ray: Any = importlib.import_module("ray")
dag: Any = importlib.import_module("ray.dag")

Step = Callable[[bytes], Awaitable[Any]]

IN_FLIGHT = 4


class EchoWorker:
    """Returns what it is given."""

    def __init__(self, context: Any) -> None:
        pass

    def execute_model(self, scheduler_output: bytes, intermediate: None) -> bytes:
        return scheduler_output


class EchoActor:
    """The same for Ray."""

    def step(self, message: bytes) -> bytes:
        return message


@contextlib.asynccontextmanager
async def on_ray(ranks: int, *, awaited: bool) -> AsyncIterator[Step]:
    """Steps through a compiled graph of Ray's own."""
    actors = [ray.remote(EchoActor).remote() for _ in range(ranks)]
    with dag.InputNode() as message:
        outputs = dag.MultiOutputNode([actor.step.bind(message) for actor in actors])
    graph = outputs.experimental_compile(enable_asyncio=awaited)

    async def await_it(message: bytes) -> None:
        for output in await graph.execute_async(message):
            await output

    async def block_on_it(message: bytes) -> None:
        ray.get(graph.execute(message))

    def submit(message: bytes) -> Awaitable[Any]:
        """Ray's futures must be awaited in order, each by itself, and not be cancelled."""
        return asyncio.ensure_future(await_it(message))

    yield submit if awaited else block_on_it
    await asyncio.to_thread(graph.teardown, kill_actors=True)


@contextlib.asynccontextmanager
async def on_asyncexec(ranks: int, driver: str) -> AsyncIterator[Step]:
    """Steps through the transport."""
    options = {"ray": {"backend": "none", "driver": driver}}
    config = {
        "transport": "ray",
        "tensor_parallel_size": ranks,
        "max_concurrent_batches": IN_FLIGHT,
        "options": options,
    }
    async with create_executor(config, EchoWorker) as executor:
        yield executor.execute_model


WAYS: dict[str, Callable[[int], contextlib.AbstractAsyncContextManager[Step]]] = {
    "direct": lambda ranks: on_asyncexec(ranks, "direct"),
    "documented": lambda ranks: on_asyncexec(ranks, "documented"),
    "Ray, awaited": lambda ranks: on_ray(ranks, awaited=True),
    "Ray, blocking": lambda ranks: on_ray(ranks, awaited=False),
}


async def measure(ranks: int, size: int, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of a step, by the way it took."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    message = b"x" * size
    for _ in range(rounds):
        for name, way in WAYS.items():
            async with way(ranks) as step:
                for number in range(-steps // 2, steps):
                    began = time.perf_counter()
                    await step(message)
                    if number >= 0:  # before, it warms up
                        times[name].append(time.perf_counter() - began)
    return {name: statistics.median(measured) for name, measured in times.items()}


async def throughput(ranks: int, size: int, rounds: int, steps: int) -> dict[str, float]:
    """Median over the rounds of steps per second with `IN_FLIGHT` of them under way, by the way that they took."""
    rates: dict[str, list[float]] = {}
    message = b"x" * size
    for _ in range(rounds):
        for name in ("direct", "documented", "Ray, awaited"):
            async with WAYS[name](ranks) as step:
                await step(message)
                under_way = collections.deque(step(message) for _ in range(IN_FLIGHT))
                began = time.perf_counter()
                for _ in range(steps):
                    await under_way.popleft()
                    under_way.append(step(message))
                rates.setdefault(name, []).append(steps / (time.perf_counter() - began))
                while under_way:
                    await under_way.popleft()
    return {name: statistics.median(measured) for name, measured in rates.items()}


async def measure_all(rounds: int, steps: int) -> None:
    """Print a line for each number of ranks and size."""
    for ranks in (1, 2):
        for size in (16, 10_000):
            medians = await measure(ranks, size, rounds, steps)
            figures = ", ".join(f"{name} {median * 1e6:.0f} us" for name, median in medians.items())
            awaited = medians["direct"] / medians["Ray, awaited"]
            blocking = medians["direct"] / medians["Ray, blocking"]
            print(f"{ranks} ranks, {size} B: {figures}; direct is {awaited:.2f}x awaited, {blocking:.2f}x blocking")
            rates = await throughput(ranks, size, rounds, 4 * steps)
            figures = ", ".join(f"{name} {rate:.0f}/s" for name, rate in rates.items())
            print(
                f"  {IN_FLIGHT} in flight: {figures}; direct is {rates['direct'] / rates['Ray, awaited']:.2f}x awaited"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="of each way in each round")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=16, include_dashboard=False, _system_config=LOCAL_SYSTEM_CONFIG)
    run(measure_all(arguments.rounds, arguments.steps))
    ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
