"""What a step does in Python: `python benchmarks/step_calls.py [RANKS]` counts its calls on the driver and on ranks.

Calls of Python functions and of C functions per awaited step of 64 requests on `nccl`, by `sys.setprofile`, and with
`--each` of which functions.  Unlike times, counts are the same on a busy machine: they show what a change adds.
"""

import argparse
import collections
import sys
from types import FrameType
from typing import Any

from asyncexec import create_executor, run
from asyncexec.bench.payload import SchedulerOutput, scheduler_output

STEPS = 96
"""A multiple of how often the ranks that do not reply say that they are done."""


class Counting:
    """Counts the calls of this thread between `begin` and `end`."""

    def __init__(self) -> None:
        self._calls: collections.Counter[str] = collections.Counter()

    def begin(self) -> None:
        self._calls.clear()
        sys.setprofile(self._note)

    def end(self) -> dict[str, int]:
        sys.setprofile(None)
        return dict(self._calls)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._calls[f"Python {frame.f_code.co_qualname}"] += 1
        elif event == "c_call":
            self._calls[f"C {getattr(argument, '__qualname__', argument)}"] += 1


class Worker:
    def __init__(self, context: Any) -> None:
        self._counting = Counting()

    def execute_model(self, scheduler_output: SchedulerOutput, intermediate: None) -> SchedulerOutput:
        return scheduler_output

    def begin(self) -> None:
        self._counting.begin()

    def end(self) -> dict[str, int]:
        return self._counting.end()


def show(who: str, calls: dict[str, int], each: bool) -> None:
    python, c = (sum(n for name, n in calls.items() if name.startswith(kind)) for kind in ("Python ", "C "))
    print(f"{who}: {python / STEPS:.1f} calls of Python functions, {c / STEPS:.1f} of C functions")
    if each:
        for name, count in sorted(calls.items(), key=lambda item: -item[1]):
            print(f"    {count / STEPS:6.2f} {name}")


async def main(ranks: int, each: bool) -> None:
    config = {"transport": "nccl", "tensor_parallel_size": ranks, "options": {"nccl": {"backend": "none"}}}
    value, counting = scheduler_output(64), Counting()

    async def steps() -> None:
        for _ in range(STEPS):
            await executor.execute_model(value)

    async with create_executor(config, "step_calls:Worker") as executor:
        await steps()
        await executor.collective_rpc("begin")
        await steps()
        on_ranks = await executor.collective_rpc("end")
        counting.begin()
        await steps()
        show("driver", counting.end(), each)
        for rank, calls in enumerate(on_ranks[:2]):
            show(f"rank {rank}", calls, each)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks", nargs="?", type=int, default=2)
    parser.add_argument("--each", action="store_true", help="name every function")
    run(main(**vars(parser.parse_args())))
