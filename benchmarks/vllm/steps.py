"""What a step of vLLM's costs on its own executor and on ours, in turns: back to back, and at a cadence of 10 ms.

    .venv-vllm/bin/python benchmarks/vllm/steps.py [RANKS ...]

The worker does nothing; a step is `execute_model` and `sample_tokens` with 64 requests, as the engine core calls them.
Prints the median of each and the ratio, and the processor time of driver and ranks per step.
"""

import os
import statistics
import sys
import time
from typing import Any

from asyncexec.bench import vllm_noop, vllm_tiny
from asyncexec.bench.processes import processor_seconds

ROUNDS = 8
KINDS = ("mp", "asyncexec")
PARKED = 1.2
"""Seconds after which the readers of vLLM's executor stop spinning, and no longer disturb the other."""


def turn(executor: Any, steps: int, interval: float) -> tuple[list[float], float]:
    """The steps' durations, and the processor time of all processes per step, both in seconds."""
    pids = [os.getpid(), *executor.collective_rpc("pid")]
    payload = vllm_noop.scheduler_output(64)
    before, taken = processor_seconds(pids), []
    for _ in range(steps):
        time.sleep(interval)
        began = time.perf_counter()
        vllm_noop.step(executor, payload)
        taken.append(time.perf_counter() - began)
    return taken, (processor_seconds(pids) - before) / steps


def main() -> None:
    """Measure each number of ranks in turn."""
    vllm_tiny.set_environment()
    for ranks in map(int, sys.argv[1:] or ["2", "4"]):
        executors = {kind: vllm_noop.make_executor(kind, ranks) for kind in KINDS}
        for name, steps, interval in (("back to back", 200, 0.0), ("every 10 ms", 40, 0.01)):
            taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
            processor: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(ROUNDS):
                for kind, executor in executors.items():
                    samples, used = turn(executor, steps, interval)
                    taken[kind] += samples
                    processor[kind].append(used)
                    time.sleep(PARKED)
            medians = {kind: statistics.median(taken[kind]) * 1e6 for kind in KINDS}
            used_by = {kind: statistics.median(processor[kind]) * 1e6 for kind in KINDS}
            print(
                f"{ranks} ranks, {name}: mp {medians['mp']:.0f} us, asyncexec {medians['asyncexec']:.0f} us, ratio "
                f"{medians['asyncexec'] / medians['mp']:.2f}; processor time per step: mp {used_by['mp']:.0f} us, "
                f"asyncexec {used_by['asyncexec']:.0f} us, ratio {used_by['asyncexec'] / used_by['mp']:.2f}",
                flush=True,
            )
        for executor in executors.values():
            executor.shutdown()


if __name__ == "__main__":
    main()
