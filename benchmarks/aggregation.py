"""What merging the KV connectors' reports of one step costs: `python benchmarks/aggregation.py`.

Beside it, in the same run and in rounds that alternate, a plain loop that only counts the finished requests down over
the same reports, so that machines compare: no failures, no statistics, no output to put the result on.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

from asyncexec import KVConnectorOutput, KVOutputAggregator, ModelOutput

CASES = ((64, 4), (64, 0), (8, 32), (2, 4))
"""Ranks, and requests that each reports finished sending: every step finishes them on all ranks."""

Step = Sequence[ModelOutput]


def steps_of(ranks: int, ids: int, steps: int) -> list[Step]:
    """The outputs of every rank, for as many steps."""
    return [
        [
            ModelOutput(
                kv_connector_output=KVConnectorOutput(
                    finished_sending={f"cmpl-{step}-{n}" for n in range(ids)} if ids else None
                )
            )
            for _ in range(ranks)
        ]
        for step in range(steps)
    ]


def merge(steps: Sequence[Step]) -> int:
    """All steps through the aggregator; returns how many requests were finished."""
    aggregator, finished = KVOutputAggregator(), 0
    ranks = range(len(steps[0]))
    for outputs in steps:
        partial = aggregator.begin(ranks)
        for rank, output in enumerate(outputs):
            aggregator.add(partial, rank, output)
        merged = aggregator.finish(partial, outputs[0], False)
        finished += len(merged.kv_connector_output.finished_sending or ())
    return finished


def count(steps: Sequence[Step]) -> int:
    """The plain loop."""
    remaining: dict[str, int] = {}
    total = 0
    for outputs in steps:
        finished = set()
        for output in outputs:
            for request_id in output.kv_connector_output.finished_sending or ():
                left = remaining[request_id] = remaining.get(request_id, len(outputs)) - 1
                if left == 0:
                    finished.add(request_id)
                    del remaining[request_id]
        total += len(finished)
    return total


def measure(run: Callable[[Sequence[Step]], int], steps: Sequence[Step], expected: int) -> float:
    """Microseconds a step."""
    began = time.perf_counter_ns()
    finished = run(steps)
    took = time.perf_counter_ns() - began
    if finished != expected:
        raise SystemExit(f"BROKEN: {finished} requests finished in place of {expected}")
    return took / len(steps) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100, help="of one round")
    arguments = parser.parse_args()
    print("merging one step, us (median of rounds)    merge  plain count  ratio")
    for ranks, ids in CASES:
        steps = steps_of(ranks, ids, arguments.steps)
        merged, counted = [], []
        for _ in range(arguments.rounds):
            merged.append(measure(merge, steps, ids * arguments.steps))
            counted.append(measure(count, steps, ids * arguments.steps))
        ours, plain = statistics.median(merged), statistics.median(counted)
        print(f"  {ranks:2} ranks, {ids:2} finished ids each           {ours:8.1f} {plain:12.1f} {ours / plain:6.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
