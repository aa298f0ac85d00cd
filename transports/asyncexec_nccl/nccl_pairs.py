"""Tensors from a GPU to the next stage's by NCCL, where GPUs cannot reach each other's memory or lend none.

NCCL works on side streams of each rank, one for each direction, so that a stage receives a step while it still sends
the one before.  Events order them with the stream that the worker computes on.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from asyncexec_nccl.ways import ReceivingWay, SendingWay

_BY_NCCL = frozenset(
    ("bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
)
"""Names of the dtypes that torch gives to NCCL as they are; tensors of others go as bytes."""


class PairSender(SendingWay):
    """Sends to the other rank of a process group of two.

    Args:
        device: of the tensors, a torch device string "cuda:<index>".
        pair: the group; this rank is number 0.
    """

    def __init__(self, device: str, pair: Any) -> None:
        torch: Any = importlib.import_module("torch")
        self._cuda: Any = torch.cuda
        self._device: int = torch.device(device).index
        self._pair = pair
        self._stream = self._cuda.Stream(device)
        self._computed = self._cuda.Event()

    def send(self, parts: Sequence[Any]) -> None:
        """As promised."""
        compute = self._cuda.current_stream(self._device)
        self._computed.record(compute)
        self._stream.wait_event(self._computed)
        self._cuda.set_stream(self._stream)
        try:
            for part in parts:
                self._pair.send([_transferable(part)], 1, 0).wait()  # makes the stream wait, not the CPU
        finally:
            self._cuda.set_stream(compute)
        for part in parts:
            part.record_stream(self._stream)


class PairReceiver(ReceivingWay):
    """Receives from the other rank of a process group of two.

    Args:
        device: where the tensors are to be, a torch device string "cuda:<index>".
        pair: the group; this rank is number 1.
    """

    def __init__(self, device: str, pair: Any) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._cuda: Any = self._torch.cuda
        self._device = self._torch.device(device)
        self._pair = pair
        self._stream = self._cuda.Stream(device)

    def receive(self, layouts: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Any]:
        """As promised."""
        compute = self._cuda.current_stream(self._device)
        self._cuda.set_stream(self._stream)
        try:
            # of the side stream's memory: the allocator gives out what earlier steps no longer use
            parts = [self._torch.empty(shape, dtype=dtype, device=self._device) for dtype, shape in layouts]
            works = [self._pair.recv([_transferable(part)], 0, 0) for part in parts]
        finally:
            self._cuda.set_stream(compute)
        for part, work in zip(parts, works, strict=True):
            work.wait()  # makes the stream wait, not the CPU
            part.record_stream(compute)
        return parts


def _transferable(tensor: Any) -> Any:
    if str(tensor.dtype).removeprefix("torch.") in _BY_NCCL:
        return tensor
    return tensor.view(-1).view(importlib.import_module("torch").uint8)
