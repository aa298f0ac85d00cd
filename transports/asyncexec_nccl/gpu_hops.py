"""Intermediate tensors from one pipeline stage to the next where ranks have GPUs: by NCCL, GPU to GPU.

A hop is one small frame on the socket pair between the two ranks, and one NCCL send and receive for each tensor on the
GPU.  The frame is written first and never waits: it says which tensors come, so that the receiver knows what to
receive.  What lies in host memory travels in the frame.

NCCL works on side streams of each rank, one for each direction, so that a stage receives a step while it still sends
the one before.  Events order them with the stream that the worker computes on; no CPU waits for a GPU.  Every
announced tensor is received, also that of a step which the receiver could not run: NCCL matches sends and receives by
their order alone.  A rank that cannot, for lack of memory say, ends: see `OutOfStep`.
"""

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from asyncexec.errors import PayloadError
from asyncexec.tensors import decode_tensors, encode_tensors, is_tensor_type
from asyncexec.wire import Frame, FrameKind
from asyncexec_nccl.devices import OutOfStep
from asyncexec_nccl.hops import HopReceiver, HopSender
from asyncexec_nccl.stream import RankStream

_PLANS = 512
"""Layouts that are remembered: as many as there are usual numbers of tokens in a step."""


_BY_NCCL = frozenset(
    ("bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
)
"""Names of the dtypes that torch gives to NCCL as they are; tensors of others go as bytes."""


class Announced(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that comes by NCCL.

    Attributes:
        name: its name.
        dtype: torch's name of its dtype.
        shape: its shape, whole.
        sliced: whether each tensor-parallel rank gets a part of it: 1 / tensor_parallel_size of its elements in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sliced: bool


class _Announcement(msgspec.Struct, frozen=True, array_like=True):
    """The body of a hop's frame: the tensors that come by NCCL, and the body of those in the frame itself."""

    on_gpu: list[Announced]
    on_host: bytes


class SideStream:
    """A stream beside the one that the worker computes on.

    Args:
        device: torch device string, "cuda:<index>".
    """

    def __init__(self, device: str) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._cuda: Any = self._torch.cuda
        self._device = self._torch.device(device)
        self._index: int = self._device.index
        self._stream = self._cuda.Stream(self._device)
        self._computed = self._cuda.Event()

    def send(self, pair: Any, parts: Sequence[Any]) -> None:
        """Send tensors once what computes them is done; their memory is not reused before they are sent."""
        compute = self._cuda.current_stream(self._index)
        self._computed.record(compute)
        self._stream.wait_event(self._computed)
        self._cuda.set_stream(self._stream)
        try:
            for part in parts:
                pair.send([part], 1, 0).wait()  # makes the stream wait, not the CPU
        finally:
            self._cuda.set_stream(compute)
        for part in parts:
            part.record_stream(self._stream)

    def receive(self, pair: Any, layouts: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Any]:
        """Receive tensors of these dtypes and shapes; what the worker computes afterwards waits for them."""
        compute = self._cuda.current_stream(self._index)
        self._cuda.set_stream(self._stream)
        try:
            # of the side stream's memory: the allocator gives out what earlier steps no longer use
            parts = [self._torch.empty(shape, dtype=dtype, device=self._device) for dtype, shape in layouts]
            works = [pair.recv([part], 0, 0) for part in parts]
        finally:
            self._cuda.set_stream(compute)
        for part, work in zip(parts, works, strict=True):
            work.wait()  # makes the stream wait, not the CPU
            part.record_stream(compute)
        return parts


class GpuHopSender(HopSender):
    """The way to the next stage.

    A tensor on the GPU that was handed on must not be written to afterwards, as it may still be on its way; its memory
    is kept until it has been sent.  A worker whose output lies in memory that it writes to again, such as that of a
    CUDA graph, hands on a clone.

    Args:
        stream: the connection to it.
        max_frame_bytes: of the configuration; it limits what goes in the frame.
        pair: the process group with the next stage's rank.
        side: where NCCL works.
        device: of the tensors that NCCL sends.
        part, parts: tensor-parallel rank and size.
    """

    def __init__(
        self,
        stream: RankStream,
        max_frame_bytes: int,
        pair: Any,
        side: SideStream,
        device: str,
        part: int,
        parts: int,
    ) -> None:
        super().__init__(stream, max_frame_bytes)
        self._pair = pair
        self._side = side
        self._device = _device(device)
        self._part = part
        self._parts = parts

    def send(self, call_id: int, tensors: Mapping[str, Any] | None, replicated: frozenset[str] = frozenset()) -> None:
        """Send a step's tensors, or None to say that there are none; returns before they have been sent.

        Raises:
            PayloadError: those in host memory are larger than a frame may be; nothing was sent.
            TypeError: one is neither a tensor nor an array; nothing was sent.
        """
        if tensors is None:
            super().send(call_id, None)
            return
        on_gpu = {name: value for name, value in tensors.items() if _is_on(self._device, value)}
        on_host = {name: value for name, value in tensors.items() if name not in on_gpu}
        body, buffers = encode_tensors(on_host) if on_host else (b"", ())
        announced: list[Announced] = []
        parts: list[Any] = []
        for name, tensor in on_gpu.items():
            sliced = self._parts > 1 and name in replicated and tensor.numel() % self._parts == 0
            announced.append(_announced(name, tensor.dtype, tensor.shape, sliced))
            if tensor.numel():
                flat = tensor if tensor.is_contiguous() else tensor.contiguous()
                part = flat.view(self._parts, -1)[self._part] if sliced else flat
                parts.append(part if announced[-1].dtype in _BY_NCCL else _bytes_of(part))
        frame = Frame(FrameKind.CALL, call_id, body=_encode(_Announcement(announced, bytes(body))), buffers=buffers)
        if refusal := frame.refusal(self._max_frame_bytes):
            raise PayloadError(f"the intermediate tensors {refusal}")
        self.write(frame)
        if parts:
            self._side.send(self._pair, parts)


class GpuHopReceiver(HopReceiver):
    """The way from the previous stage.

    Args:
        stream: the connection to it.
        device: where the tensors are to be.
        pair: the process group with the previous stage's rank.
        side: where NCCL works.
        tensor_parallel: the stage's process group; None where there is one rank.
        parts: tensor-parallel size.
    """

    def __init__(
        self, stream: RankStream, device: str, pair: Any, side: SideStream, tensor_parallel: Any, parts: int
    ) -> None:
        super().__init__(stream, device)
        self._pair = pair
        self._side = side
        self._tensor_parallel = tensor_parallel
        self._parts = parts

    def take(self, frame: Frame) -> Mapping[str, Any]:
        """The tensors that a frame announces; the worker's stream waits for them, the CPU does not.

        Raises:
            OutOfStep: they cannot be received.
        """
        plan = _plan(bytes(frame.body))
        received = iter(self._receive(plan))
        tensors: dict[str, Any] = {}
        for announced, dtype in zip(plan.on_gpu, plan.dtypes, strict=True):
            whole = next(received) if _elements(announced.shape) else _empty(announced.shape, dtype, self._device)
            tensors[announced.name] = self._gather(whole, announced.shape) if announced.sliced else whole
        if plan.on_host:
            tensors |= decode_tensors(plan.on_host, frame.buffers, self._device)
        return tensors

    def drop(self, frame: Frame) -> None:
        """Receive the tensors of a step that this stage could not run: the next ones are behind them."""
        if frame.kind is not FrameKind.SKIPPED:
            self._receive(_plan(bytes(frame.body)))

    def _receive(self, plan: "_Plan") -> list[Any]:
        wanted = [
            (dtype, (_elements(one.shape) // self._parts,) if one.sliced else one.shape, one.dtype in _BY_NCCL)
            for one, dtype in zip(plan.on_gpu, plan.dtypes, strict=True)
            if _elements(one.shape)
        ]
        if not wanted:
            return []
        layouts = [
            (dtype, shape) if known else (_uint8(), (_elements(shape) * dtype.itemsize,))
            for dtype, shape, known in wanted
        ]
        try:
            parts = self._side.receive(self._pair, layouts)
        except Exception as error:
            raise OutOfStep from error
        return [
            part if known else part.view(dtype).view(shape)
            for part, (dtype, shape, known) in zip(parts, wanted, strict=True)
        ]

    def _gather(self, part: Any, shape: tuple[int, ...]) -> Any:
        """Put the parts of the stage's ranks together, on the stream that the worker computes on."""
        if not part.numel():
            return part
        dist: Any = importlib.import_module("torch.distributed")
        # the same function; torch 2.13 gave it a new name
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        try:
            whole = part.new_empty(shape)
            gather(_bytes_of(whole), _bytes_of(part), group=self._tensor_parallel)
        except Exception as error:
            raise OutOfStep from error
        return whole


class _Plan(NamedTuple):
    on_gpu: list[Announced]
    dtypes: list[Any]
    on_host: bytes


@functools.lru_cache(maxsize=_PLANS)
def _plan(body: bytes) -> _Plan:
    announcement = msgspec.msgpack.decode(body, type=_Announcement)
    torch: Any = importlib.import_module("torch")
    return _Plan(announcement.on_gpu, [getattr(torch, one.dtype) for one in announcement.on_gpu], announcement.on_host)


@functools.lru_cache(maxsize=_PLANS)
def _announced(name: str, dtype: Any, shape: Any, sliced: bool) -> Announced:
    return Announced(name, str(dtype).removeprefix("torch."), tuple(shape), sliced)


def _bytes_of(tensor: Any) -> Any:
    return tensor.view(-1).view(_uint8())


def _uint8() -> Any:
    return importlib.import_module("torch").uint8


def _device(name: str) -> Any:
    torch: Any = importlib.import_module("torch")
    return torch.device(name)


def _is_on(device: Any, value: Any) -> bool:
    return is_tensor_type(type(value)) and value.device == device


def _elements(shape: tuple[int, ...]) -> int:
    return functools.reduce(int.__mul__, shape, 1)


def _empty(shape: tuple[int, ...], dtype: Any, device: str) -> Any:
    torch: Any = importlib.import_module("torch")
    return torch.empty(shape, dtype=dtype, device=device)


_encode = msgspec.msgpack.Encoder().encode
