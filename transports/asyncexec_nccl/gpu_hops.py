"""Intermediate tensors from one pipeline stage to the next where ranks have GPUs: GPU to GPU.

A hop is one small frame on the socket pair between the two ranks, and what brings the tensors on the GPU: a way, see
`asyncexec_nccl.ways`.  The frame is written first and never waits: it says which tensors come, so that the receiver
knows what to receive.  What lies in host memory travels in the frame.

No CPU waits for a GPU.  Every announced tensor is received, also that of a step which the receiver could not run: a way
matches what is sent and received by the order alone.  A rank that cannot, for lack of memory say, ends: see
`OutOfStep`.
"""

import functools
import importlib
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from asyncexec.errors import PayloadError
from asyncexec.process_groups import gather
from asyncexec.tensors import decode_tensors, encode_tensors, is_tensor_type
from asyncexec.wire import Frame, FrameKind
from asyncexec_nccl.devices import OutOfStep
from asyncexec_nccl.hops import Hop, HopReceiver, HopSender
from asyncexec_nccl.stream import RankStream
from asyncexec_nccl.ways import ReceivingWay, SendingWay, Way

W = TypeVar("W", bound=Way)

_PARTING_LIMIT = 2.0
"""Seconds that a neighbour is given to let go of this rank's memory, before that is freed all the same."""

_PLANS = 512
"""Layouts that are remembered: as many as there are usual numbers of tokens in a step."""


class Announced(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that comes from GPU to GPU.

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
    """The body of a hop's frame: the tensors that come from GPU to GPU, and the body of those in the frame itself."""

    on_gpu: list[Announced]
    on_host: bytes


class _GpuHop(Hop, Generic[W]):
    """Parts from the neighbour: each lets go of what is the other's, and then frees its own."""

    _way: W

    def let_go(self) -> None:
        """Use it no more, and let go of what is the neighbour's."""
        super().let_go()
        self._way.let_go()
        self.stream.end_writing()

    def close(self) -> None:
        """Free what the neighbour has let go of."""
        self.stream.wait_for_end(_PARTING_LIMIT)
        self._way.close()
        super().close()


class GpuHopSender(_GpuHop[SendingWay], HopSender):
    """The way to the next stage.

    A tensor on the GPU that was handed on must not be written to afterwards, as it may still be on its way; its memory
    is kept until it has been sent.  A worker whose output lies in memory that it writes to again, such as that of a
    CUDA graph, hands on a clone.

    Args:
        stream: the connection to it.
        max_frame_bytes: of the configuration; it limits what goes in the frame.
        way: of the tensors that are on the GPU.
        device: this GPU.
        part, parts: tensor-parallel rank and size.
    """

    def __init__(
        self,
        stream: RankStream,
        max_frame_bytes: int,
        way: SendingWay,
        device: str,
        part: int,
        parts: int,
    ) -> None:
        super().__init__(stream, max_frame_bytes)
        self._way = way
        self._device = _device(device)
        self._part = part
        self._parts = parts

    def send(self, call_id: int, tensors: Mapping[str, Any] | None, replicated: frozenset[str] = frozenset()) -> None:
        """Send a step's tensors, or None to say that there are none; returns before they have been sent.

        Raises:
            PayloadError: those in host memory are larger than a frame may be; nothing was sent.
            TypeError: one is neither a tensor nor an array; nothing was sent.
            OutOfStep: the next stage has been told of them, and they cannot be sent.
        """
        if tensors is None:
            super().send(call_id, None)
            return
        on_host: dict[str, Any] = {}
        announced: list[Announced] = []
        parts: list[Any] = []
        for name, tensor in tensors.items():
            if not (is_tensor_type(type(tensor)) and tensor.device == self._device):
                on_host[name] = tensor
                continue
            sliced = self._parts > 1 and name in replicated and tensor.numel() % self._parts == 0
            announced.append(_announced(name, tensor.dtype, tensor.shape, sliced))
            if tensor.numel():
                flat = tensor.contiguous()
                parts.append(flat.view(self._parts, -1)[self._part] if sliced else flat)
        body, buffers = encode_tensors(on_host) if on_host else (b"", ())
        frame = Frame(FrameKind.CALL, call_id, body=_encode(_Announcement(announced, bytes(body))), buffers=buffers)
        if refusal := frame.refusal(self._max_frame_bytes):
            raise PayloadError(f"the intermediate tensors {refusal}")
        self.write(frame)
        if parts:
            try:
                self._way.send(parts)
            except Exception as error:
                raise OutOfStep from error


class GpuHopReceiver(_GpuHop[ReceivingWay], HopReceiver):
    """The way from the previous stage.

    Args:
        stream: the connection to it.
        device: where the tensors are to be.
        way: of the tensors that come from GPU to GPU.
        tensor_parallel: the stage's process group; None where there is one rank.
        parts: tensor-parallel size.
    """

    def __init__(self, stream: RankStream, device: str, way: ReceivingWay, tensor_parallel: Any, parts: int) -> None:
        super().__init__(stream, device)
        self._way = way
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
        layouts = [
            (dtype, (_elements(one.shape) // self._parts,) if one.sliced else one.shape)
            for one, dtype in zip(plan.on_gpu, plan.dtypes, strict=True)
            if _elements(one.shape)
        ]
        try:
            return self._way.receive(layouts) if layouts else []
        except Exception as error:
            raise OutOfStep from error

    def _gather(self, part: Any, shape: tuple[int, ...]) -> Any:
        """Put the parts of the stage's ranks together, on the stream that the worker computes on."""
        if not part.numel():
            return part
        try:
            whole = part.new_empty(shape)
            gather(_bytes_of(whole), _bytes_of(part), self._tensor_parallel)
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


def _elements(shape: tuple[int, ...]) -> int:
    return functools.reduce(int.__mul__, shape, 1)


def _empty(shape: tuple[int, ...], dtype: Any, device: str) -> Any:
    torch: Any = importlib.import_module("torch")
    return torch.empty(shape, dtype=dtype, device=device)


_encode = msgspec.msgpack.Encoder().encode
