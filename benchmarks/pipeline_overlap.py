"""Whether two steps in flight on two pipeline stages overlap: `python benchmarks/pipeline_overlap.py`.

Each stage sleeps, which stands for a GPU's work, so the machine's cores do not matter.  Ideal is (n + 1) / 2n.
"""

import argparse
import time
from typing import Any

import numpy as np

from asyncexec import IntermediateTensors, create_executor, run


class SleepyStage:
    """Takes `seconds` and hands a small array on."""

    def __init__(self, context: Any, *, seconds: float) -> None:
        self.context = context
        self.seconds = seconds

    def execute_model(self, scheduler_output: int, intermediate: Any) -> Any:
        time.sleep(self.seconds)
        return scheduler_output if self.context.is_last_stage else IntermediateTensors({"x": np.zeros(1024)})


async def measure(in_flight: int, steps: int, seconds: float) -> float:
    """Seconds that `steps` steps take."""
    config = {
        "transport": "nccl",
        "pipeline_parallel_size": 2,
        "max_concurrent_batches": in_flight,
        "options": {"nccl": {"backend": "none"}},
    }
    async with create_executor(config, SleepyStage, worker_kwargs={"seconds": seconds}) as executor:
        await executor.execute_model(0)
        began = time.perf_counter()
        for future in [executor.execute_model(n) for n in range(steps)]:
            await future
        return time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--milliseconds", type=float, default=20.0, help="of each stage")
    arguments = parser.parse_args()
    one, two = (run(measure(n, arguments.steps, arguments.milliseconds / 1000)) for n in (1, 2))
    print(f"{arguments.steps} steps of 2 stages of {arguments.milliseconds:g} ms: {one:.2f} s with one in flight,")
    print(f"  {two:.2f} s with two: {two / one:.3f} of it (ideal {(arguments.steps + 1) / (2 * arguments.steps):.3f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
