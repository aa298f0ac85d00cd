"""What merges the ranks' reports of their KV connectors, of requests that they have finished sending."""

import importlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

from asyncexec import KVConnectorOutput, KVOutputAggregator, ModelOutput
from asyncexec.bench import vllm_tiny
from asyncexec.bench.payload import Payload
from asyncexec.bench.peer import WithoutRanks

Steps = Sequence[Sequence[set[str]]]
"""For each step, what each rank has finished."""


class Aggregator(WithoutRanks):
    """It runs no steps."""

    requests = False
    tensors = False

    def submit(self, value: Payload) -> Awaitable[Any]:
        """Is never called."""
        raise NotImplementedError


class Counting(Aggregator):
    """The least: a loop that counts each request down, without failures, statistics, or an output to put them on."""

    def merging(self, steps: Steps) -> Callable[[], int]:
        """Nothing to prepare."""

        def merge() -> int:
            remaining: dict[str, int] = {}
            total = 0
            for reports in steps:
                finished = set()
                for report in reports:
                    for request_id in report:
                        left = remaining[request_id] = remaining.get(request_id, len(reports)) - 1
                        if left == 0:
                            finished.add(request_id)
                            del remaining[request_id]
                total += len(finished)
            return total

        return merge


class AsyncExecKV(Aggregator):
    """asyncexec's KVOutputAggregator."""

    def merging(self, steps: Steps) -> Callable[[], int]:
        """Make the outputs."""
        outputs = [
            [ModelOutput(kv_connector_output=KVConnectorOutput(finished_sending=ids or None)) for ids in reports]
            for reports in steps
        ]

        def merge() -> int:
            aggregator, finished = KVOutputAggregator(), 0
            ranks = range(self.ranks)
            for of_ranks in outputs:
                partial = aggregator.begin(ranks)
                for rank, output in enumerate(of_ranks):
                    aggregator.add(partial, rank, output)
                merged = aggregator.finish(partial, of_ranks[0], False)
                finished += len(merged.kv_connector_output.finished_sending or ())
            return finished

        return merge


class VllmKV(Aggregator):
    """vLLM's KVOutputAggregator."""

    needs: ClassVar[dict[str, str]] = vllm_tiny.VLLM

    def merging(self, steps: Steps) -> Callable[[], int]:
        """Make the outputs, in vLLM's own classes."""
        outputs: Any = importlib.import_module("vllm.v1.outputs")
        module: Any = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.utils")
        made = [
            [
                outputs.ModelRunnerOutput(
                    req_ids=[],
                    req_id_to_index={},
                    kv_connector_output=outputs.KVConnectorOutput(finished_sending=ids or None),
                )
                for ids in reports
            ]
            for reports in steps
        ]

        def merge() -> int:
            aggregator, finished = module.KVOutputAggregator(self.ranks), 0
            for of_ranks in made:
                merged = aggregator.aggregate(of_ranks, 0)
                if merged is not None and merged.kv_connector_output is not None:
                    finished += len(merged.kv_connector_output.finished_sending or ())
            return finished

        return merge
