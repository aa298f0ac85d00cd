"""The two-stage step of `ray_peer` through the `ray` transport: a 1 MiB tensor over Ray's NCCL channel, awaited."""

import importlib
import logging
import time
from typing import Any

from asyncexec import IntermediateTensors, RankContext, create_executor, run
from rows import microseconds, row

NBYTES = 1 << 20


class Stages:
    """Hands a tensor on from GPU to GPU, and returns 64 of its numbers."""

    def __init__(self, context: RankContext) -> None:
        torch: Any = importlib.import_module("torch")
        self.context = context
        self.tensor = torch.arange(NBYTES // 2, device=context.device).to(torch.bfloat16)

    def execute_model(self, scheduler_output: list[int], intermediate: Any) -> Any:
        if self.context.is_first_stage:
            return IntermediateTensors({"x": self.tensor})
        received = intermediate["x"]
        if received.device.type != "cuda":
            raise TypeError(f"the tensor came to {received.device}")
        return received[:64].tolist()


async def steps(count: int) -> list[float]:
    """Seconds of each awaited step."""
    options = {"ray": {"backend": "none", "tensor_transport": "nccl"}}
    config = {"transport": "ray", "pipeline_parallel_size": 2, "options": options}
    times = []
    async with create_executor(config, Stages) as executor:
        for _ in range(count):
            began = time.perf_counter()
            result = await executor.execute_model(list(range(64)))
            times.append(time.perf_counter() - began)
    if result != [float(n) for n in range(64)]:
        raise SystemExit(f"BROKEN: the tensor came as {result}")
    return times


def main() -> None:
    ray: Any = importlib.import_module("ray")
    ray.init(num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    times = microseconds(run(steps(700))[200:])
    row("ray transport, two stages, 1 MiB by Ray's NCCL channel, awaited", times["p50"], "us", p99=times["p99"])
    ray.shutdown()


if __name__ == "__main__":
    main()
