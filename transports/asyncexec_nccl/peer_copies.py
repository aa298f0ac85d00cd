"""Tensors from a GPU to the next stage's by copies into memory that the receiver lends.

The receiver lends a ring of its GPU's memory, which the sender opens (CUDA IPC).  A transfer is a copy into the ring by
the sender, and one out of it by the receiver, who so has memory of its own.  Two numbers tell how far each is: the last
batch sent, in the receiver's memory, and the last one taken, in the sender's.  The streams of both GPUs write them, and
wait for them; no CPU does, and nothing but the numbers passes between the two.

So a transfer costs each side some small calls, and may be enqueued by the receiver before it is by the sender.
"""

import contextlib
import importlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from asyncexec.wire import Frame, FrameKind
from asyncexec_nccl import cuda_driver
from asyncexec_nccl.cuda_driver import BorrowedMemory, CudaError, LentMemory
from asyncexec_nccl.ring import ALIGNMENT, Ring, aligned
from asyncexec_nccl.stream import RankStream
from asyncexec_nccl.ways import ReceivingWay, SendingWay

_logger = logging.getLogger(__name__)


class _Offer(msgspec.Struct, frozen=True, array_like=True):
    """What the receiver lends: memory with a ring in it, and behind that the number of the last batch sent."""

    handle: bytes
    capacity: int


class PeerSender(SendingWay):
    """Copies into the memory that the next stage's rank lends.

    Args:
        device: of the tensors, a torch device string "cuda:<index>".
        offer: of the receiver.

    Raises:
        CudaError: its memory cannot be reached.
    """

    def __init__(self, device: str, offer: bytes) -> None:
        lent = msgspec.msgpack.decode(offer, type=_Offer)
        torch: Any = importlib.import_module("torch")
        self._cuda: Any = torch.cuda
        self._device: int = torch.device(device).index
        self._stream = self._cuda.Stream(device)
        self._handle: int = self._stream.cuda_stream
        self._computed = self._cuda.Event()
        self._ring = Ring(lent.capacity)
        with contextlib.ExitStack() as undone:
            self._taken = LentMemory(ALIGNMENT)
            undone.callback(self._taken.close)
            self._theirs = BorrowedMemory(lent.handle)
            undone.callback(self._theirs.close)
            self._sent = self._theirs.address + lent.capacity
            # what cannot be done is to show now; the numbers are 0 anyway
            cuda_driver.write(self._sent, 0, self._handle)
            cuda_driver.wait_for(self._taken.address, 0, self._handle)
            undone.pop_all()

    @property
    def answer(self) -> bytes:
        """What the receiver needs to know."""
        return self._taken.handle

    def send(self, parts: Sequence[Any]) -> None:
        """As promised; raises CudaError."""
        compute = self._cuda.current_stream(self._device)
        self._computed.record(compute)
        self._stream.wait_event(self._computed)
        for batch in self._ring.place([part.nbytes for part in parts]):
            if batch.waits_for is not None:
                cuda_driver.wait_for(self._taken.address, batch.waits_for, self._handle)
            for piece in batch.pieces:
                source = parts[piece.buffer].data_ptr() + piece.offset
                cuda_driver.copy(self._theirs.address + piece.begin, source, piece.nbytes, self._handle)
            cuda_driver.write(self._sent, batch.number, self._handle)
        for part in parts:
            part.record_stream(self._stream)

    def let_go(self) -> None:
        """Of the receiver's memory."""
        self._theirs.close()

    def close(self) -> None:
        """Free the number, which the receiver has let go of."""
        self._taken.close()


class PeerReceiver(ReceivingWay):
    """Copies out of memory that this rank lends to the previous stage's.

    Args:
        device: where the tensors are to be, a torch device string "cuda:<index>".
        capacity: bytes of the ring.

    Raises:
        CudaError: so much memory cannot be lent.
    """

    def __init__(self, device: str, capacity: int) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._device = self._torch.device(device)
        self._capacity = capacity = aligned(capacity)
        self._ring = Ring(capacity)
        self._memory = LentMemory(capacity + ALIGNMENT)
        self._sent = self._memory.address + capacity
        self._taken: BorrowedMemory | None = None

    @property
    def offer(self) -> bytes:
        """What the sender needs to know."""
        return msgspec.msgpack.encode(_Offer(self._memory.handle, self._capacity))

    def accept(self, answer: bytes) -> None:
        """Open the sender's number.  Raises CudaError where it cannot be reached."""
        self._taken = BorrowedMemory(answer)
        stream = self._torch.cuda.current_stream(self._device).cuda_stream
        cuda_driver.write(self._taken.address, 0, stream)  # as in the sender
        cuda_driver.wait_for(self._sent, 0, stream)

    def receive(self, layouts: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Any]:
        """As promised; raises CudaError, torch.OutOfMemoryError."""
        if self._taken is None:
            raise CudaError("the sender has not answered")
        stream = self._torch.cuda.current_stream(self._device).cuda_stream
        parts = [self._torch.empty(shape, dtype=dtype, device=self._device) for dtype, shape in layouts]
        for batch in self._ring.place([part.nbytes for part in parts]):
            cuda_driver.wait_for(self._sent, batch.number, stream)
            for piece in batch.pieces:
                target = parts[piece.buffer].data_ptr() + piece.offset
                cuda_driver.copy(target, self._memory.address + piece.begin, piece.nbytes, stream)
            cuda_driver.write(self._taken.address, batch.number, stream)
        return parts

    def let_go(self) -> None:
        """Of the sender's number."""
        if self._taken is not None:
            self._taken.close()

    def close(self) -> None:
        """Free the memory, which the sender has let go of."""
        self._memory.close()


def meet(
    previous: RankStream | None, following: RankStream | None, device: str, capacity: int
) -> tuple[PeerReceiver | None, PeerSender | None]:
    """Make the ways to the neighbouring stages; blocks until the neighbours do the same.

    Args:
        previous, following: connections to the neighbours; None where there is none.
        device: of this rank.
        capacity: bytes of a ring.

    Returns:
        The way from the previous stage and the one to the following; None where there is no neighbour, or the GPUs
        cannot reach each other's memory.

    Raises:
        ConnectionError: a neighbour is gone.
    """
    receiver = sender = None
    if previous is not None:
        with _unless_out_of_reach():
            receiver = PeerReceiver(device, capacity)
        _tell(previous, receiver.offer if receiver else b"")
    if following is not None and (offer := _told(following)):
        with _unless_out_of_reach():
            sender = PeerSender(device, offer)
        _tell(following, sender.answer if sender else b"")
    if receiver is None or previous is None:
        return None, sender
    if answer := _told(previous):
        with _unless_out_of_reach():
            receiver.accept(answer)
            return receiver, sender
    receiver.let_go()
    receiver.close()
    return None, sender


@contextlib.contextmanager
def _unless_out_of_reach() -> Iterator[None]:
    try:
        yield
    except CudaError as error:
        _logger.warning("GPUs cannot reach each other's memory, so intermediate tensors go by NCCL: %s", error)


def _tell(neighbour: RankStream, body: bytes) -> None:
    neighbour.send(Frame(FrameKind.START, body=body).pack())


def _told(neighbour: RankStream) -> bytes:
    frame = neighbour.receive()
    if frame is None:
        raise ConnectionError("a neighbouring pipeline stage is gone")
    return bytes(frame.body)
