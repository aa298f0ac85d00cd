"""An awaited step on the `ray` transport beside Ray's own compiled graphs: `python benchmarks/ray_step.py`.

Four ways to have 1 or 2 actors echo a byte string of 16 bytes or 10 KB, one step at a time: through asyncexec, on its
direct and on its documented path; Ray's own `await graph.execute_async(...)`; and Ray's blocking
`ray.get(graph.execute(...))`.  They are measured in rounds that alternate between them, because machines are noisy; the
figures are medians, and the ratios are of medians.
"""

import argparse
import asyncio
import importlib
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from asyncexec import create_executor, run
from asyncexec_ray.cluster import LOCAL_SYSTEM_CONFIG

ray: Any = importlib.import_module("ray")
dag: Any = importlib.import_module("ray.dag")

Step = Callable[[bytes], Awaitable[Any]]


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


def make_graph(ranks: int, *, awaited: bool) -> Any:
    """A compiled graph of Ray's own; on the running loop where it is awaited."""
    actors = [ray.remote(EchoActor).remote() for _ in range(ranks)]
    with dag.InputNode() as message:
        outputs = dag.MultiOutputNode([actor.step.bind(message) for actor in actors])
    return outputs.experimental_compile(enable_asyncio=awaited)


async def measure(ranks: int, size: int, rounds: int, steps: int) -> dict[str, float]:
    """Median seconds of a step, by the way it took."""
    awaited, blocking = make_graph(ranks, awaited=True), make_graph(ranks, awaited=False)

    async def await_ray(message: bytes) -> None:
        for output in await awaited.execute_async(message):
            await output

    async def block_on_ray(message: bytes) -> None:
        ray.get(blocking.execute(message))

    config = {"transport": "ray", "tensor_parallel_size": ranks}
    direct = {"backend": "none", "idle_teardown": None}
    async with (
        create_executor(config | {"options": {"ray": direct}}, EchoWorker) as ours,
        create_executor(config | {"options": {"ray": direct | {"driver": "documented"}}}, EchoWorker) as documented,
    ):
        ways: dict[str, Step] = {
            "direct": ours.execute_model,
            "documented": documented.execute_model,
            "Ray, awaited": await_ray,
            "Ray, blocking": block_on_ray,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        message = b"x" * size
        for number in range(rounds):
            for name, step in ways.items():
                for _ in range(steps):
                    began = time.perf_counter()
                    await step(message)
                    if number:  # the first round warms up
                        times[name].append(time.perf_counter() - began)
    for graph in (awaited, blocking):
        await asyncio.to_thread(graph.teardown, kill_actors=True)
    return {name: statistics.median(measured) for name, measured in times.items()}


async def measure_all(rounds: int, steps: int) -> None:
    """Print a line for each number of ranks and size."""
    for ranks in (1, 2):
        for size in (16, 10_000):
            medians = await measure(ranks, size, rounds, steps)
            figures = ", ".join(f"{name} {median * 1e6:.0f} us" for name, median in medians.items())
            awaited = medians["direct"] / medians["Ray, awaited"]
            blocking = medians["direct"] / medians["Ray, blocking"]
            print(f"{ranks} ranks, {size} B: {figures}; direct is {awaited:.2f}x awaited, {blocking:.2f}x blocking")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=200, help="of each way in each round")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=16, include_dashboard=False, _system_config=LOCAL_SYSTEM_CONFIG)
    run(measure_all(arguments.rounds, arguments.steps))
    ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
