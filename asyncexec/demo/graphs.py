"""Decode steps as CUDA graphs: one launch in place of the hundreds that a step of single tokens is made of.

Launched one by one, the kernels of a small model's decode step take the CPU longer than the GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asyncexec.demo.attention import BatchLayout, DecodeBatch, KVCache
from asyncexec.demo.llama import LlamaStage

_MOST = 64
"""Graphs that are kept; they share their memory."""

_Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    logits: Tensor


class DecodeGraphs:
    """The graphs of a model that is on this GPU as a whole, by number of requests and width of the block tables.

    A shape that comes for the first time runs without; if it comes again, it is captured.

    Args:
        stage: the model.
        caches: one for each of its layers.
    """

    def __init__(self, stage: LlamaStage, caches: Sequence[KVCache]) -> None:
        self._stage = stage
        self._caches = caches
        self._seen: set[_Key] = set()
        self._graphs: dict[_Key, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def logits(self, tokens: Tensor, layout: BatchLayout) -> Tensor | None:
        """Run a step in which every request runs one token, and samples.

        Args:
            tokens: int64 [requests].
            layout: of the step.

        Returns:
            Logits [requests, vocab], overwritten by the next call; None where the step is to run without a graph.
        """
        if layout.decodes is None or layout.prefills or len(layout.last_rows) != len(tokens):
            return None
        key = (layout.decodes.blocks.shape[0], layout.decodes.blocks.shape[1])
        if key not in self._seen:
            self._seen.add(key)
            return None
        if key not in self._graphs:
            if len(self._graphs) == _MOST:
                self._graphs.clear()
            self._graphs[key] = self._capture(tokens, layout)
        captured = self._graphs[key]
        for ours, given in zip(captured.inputs, _inputs(tokens, layout), strict=True):
            ours.copy_(given)
        captured.graph.replay()
        return captured.logits

    def _capture(self, tokens: Tensor, layout: BatchLayout) -> _Graph:
        inputs = [tensor.clone() for tensor in _inputs(tokens, layout)]
        tokens, positions, slots, last_rows, rows, blocks, mask = inputs
        decodes = DecodeBatch(rows, blocks, mask)
        layout = replace(layout, positions=positions, slots=slots, last_rows=last_rows, decodes=decodes)
        graph = torch.cuda.CUDAGraph()
        # the completion thread may wait for an event meanwhile: of no concern to the capture
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._stage(tokens, self._caches, layout)
            logits = self._stage.logits(hidden[layout.last_rows])
        return _Graph(graph, inputs, logits)


def _inputs(tokens: Tensor, layout: BatchLayout) -> list[Tensor]:
    if layout.decodes is None:
        raise ValueError("a step without requests of one token")
    decodes = layout.decodes
    return [
        tokens,
        layout.positions,
        layout.slots,
        layout.last_rows,
        decodes.rows,
        decodes.blocks,
        decodes.mask,
    ]
