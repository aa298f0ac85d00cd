"""What vLLM's KV and encoder-cache connectors report, merged by asyncexec's aggregators."""

import copy
import importlib
from collections.abc import Sequence
from typing import Any

from asyncexec.aggregate import Aggregator, Chain
from asyncexec.connectors import ECOutputAggregator, KVOutputAggregator


def kv_aggregator(connector: Any, world_size: int) -> KVOutputAggregator:
    """For this connector, whose own expected count wins over the number of ranks; as vLLM's `from_connector`."""
    return KVOutputAggregator(connector.get_finished_count() or world_size, _empty_output)


def ec_aggregator() -> ECOutputAggregator:
    """For encoder-cache connectors."""
    return ECOutputAggregator(_empty_output)


def step_aggregator(*aggregators: Aggregator | None) -> Aggregator | None:
    """The aggregator for both calls of a step; None where there is nothing to merge."""
    there = [aggregator for aggregator in aggregators if aggregator is not None]
    return _StepAggregator(there) if there else None


class _StepAggregator(Chain):
    """Holds reports back until there is an output to carry them.

    None from the output rank's `execute_model` tells the engine core that sampling follows: it must stay None, though
    other pipeline stages may have reported in the same call.
    """

    def __init__(self, aggregators: Sequence[Aggregator]) -> None:
        super().__init__(aggregators)

    def finish(self, partial: list[Any], output: Any, failed: bool) -> Any:
        """The output with what was reported since the last one."""
        merged = super().finish(partial, output, failed or output is None)
        return None if output is None else merged


def _empty_output() -> Any:
    return copy.copy(importlib.import_module("vllm.v1.outputs").EMPTY_MODEL_RUNNER_OUTPUT)
