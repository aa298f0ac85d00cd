"""Large arguments from the driver to the ranks: written once into memory that all of them share.

The driver copies a buffer there piece by piece.  After each piece it tells the ranks over their sockets, which they
wait on anyway, so that they copy one piece out while it writes the next.  Then the frame follows with the buffers that
are small.  What a rank gets is memory of its own: the worker may write to it, and keep it.

Tensors may be wanted on the ranks' devices.  Where all ranks get one, on GPUs, each copies its share from the shared
memory, which it has pinned, and gathers the others' by NCCL: see `asyncexec_nccl.staging`.

How far each rank has come it writes into the shared memory, where the driver looks before it allocates: nobody waits
for that, and nobody is told.  Where there is no room, a buffer goes beside its frame over the sockets.
"""

import asyncio
import collections
import enum
import importlib
import struct
import threading
from collections.abc import Collection, Generator, Mapping
from typing import Any, NamedTuple

import msgspec

from asyncexec.errors import ConfigError, WireError
from asyncexec.wire import Buffer, Buffers, Frame, FrameKind
from asyncexec_nccl.arena import Arena, Region
from asyncexec_nccl.buffer_store import BufferStore
from asyncexec_nccl.shared_memory import RankMemory, SharedMemory
from asyncexec_nccl.staging import StagedReader
from asyncexec_nccl.stream import DriverStream

LARGE = 1 << 16
"""Bytes from which a buffer is worth it: measured by benchmarks/large_payloads.py."""

ON_DEVICE = 1 << 20
"""Bytes from which a tensor is put on the ranks' devices, where that is wanted."""

PIECE = 1 << 21
"""Bytes that are copied before the ranks are told, and in one turn of the driver's loop: some 0.1 ms."""

_WORDS = 1 << 16
"""Bytes before the arena: one unsigned number of 8 bytes for each rank, the last region that it has copied."""


class Target(enum.IntEnum):
    """Where a buffer is to be on the ranks."""

    HOST = 0
    """In host memory."""
    DEVICE = 1
    """On the rank's device, copied there by each rank."""
    TOGETHER = 2
    """On the rank's device, a share copied there by each rank and gathered by all; the buffer is one piece."""


class Piece(NamedTuple):
    """The body of a PIECE frame: a part of a buffer of the next frame lies in the shared memory.

    Attributes:
        number: of the buffer's region.
        place: of the buffer among those of the frame.
        begin: of the region in the arena.
        nbytes: of the whole buffer.
        at: where in the buffer the piece begins; pieces come in order.
        size: of the piece; 0 where the buffer comes beside the frame, and is to be on the device.
        target: where the buffer is to be, see `Target`.
    """

    number: int
    place: int
    begin: int
    nbytes: int
    at: int
    size: int
    target: int = Target.HOST

    @classmethod
    def unpack(cls, body: Buffer) -> "Piece":
        """The piece that `pack` packed."""
        if len(body) != _PIECE.size:
            raise WireError(f"the body of a PIECE has {len(body)} bytes; it has {_PIECE.size}")
        return cls(*_PIECE.unpack(body))

    def pack(self) -> bytes:
        """As bytes."""
        return _PIECE.pack(*self)


_PIECE = struct.Struct("<7Q")


class ArgumentSender:
    """The driver's half.  Never blocks for longer than a piece takes to copy.

    Args:
        loop: the event loop on which everything is done.
        capacity: bytes that may be in use at once; 0 leaves everything to the sockets.
        to_device: whether large tensors in calls are to be on the ranks' devices.

    Raises:
        ConfigError: so much memory cannot be mapped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, capacity: int, to_device: bool = False) -> None:
        self._loop = loop
        self._to_device = to_device
        self._shared = SharedMemory("asyncexec-arguments")
        try:
            memory = self._shared.memory(_WORDS + capacity)  # addresses alone, until it is written to
        except (OSError, OverflowError) as error:
            self._shared.close()
            raise ConfigError(f"options.nccl.shared_memory_bytes is {capacity}: {error}; valid: what fits") from error
        self._copied_by_rank, self._memory = memory[:_WORDS].cast("Q"), memory[_WORDS:]
        self._arena = Arena(capacity)
        self._waiting: collections.deque[tuple[Frame, Mapping[int, DriverStream], bool]] = collections.deque()
        self._work = self._send_all()
        self._next_turn: asyncio.Handle | None = None
        self._copied = 0  # in this turn of the loop

    @property
    def descriptor(self) -> int:
        """Of the memory, for the ranks to inherit."""
        return self._shared.descriptor

    def takes(self, frame: Frame) -> bool:
        """Whether a frame is to be sent here: it has a large buffer, or one that has is not written yet."""
        return bool(self._waiting or (frame.buffers and any(map(_is_large, frame.buffers))))

    def send(self, frame: Frame, streams: Mapping[int, DriverStream], together: bool = False) -> None:
        """Send a frame to ranks, in order behind what was sent here before.

        Args:
            frame: see above.
            streams: of the ranks, by their numbers.
            together: whether these are all ranks there are, and go in step, so that they may do it together.
        """
        self._waiting.append((frame, streams, together))
        if self._next_turn is None:
            self._work = self._send_all()
            self._go_on()

    def forget(self, ranks: Collection[int]) -> None:
        """Wait no longer for ranks that have ended."""
        self._arena.forget(ranks)

    def close(self) -> None:
        """Give up what is not written yet, and let go of the memory."""
        if self._next_turn is not None:
            self._next_turn.cancel()
        self._waiting.clear()
        self._work.close()
        for view in (self._copied_by_rank, self._memory):
            view.release()  # the mapping ends with the last view
        self._shared.close()

    def _go_on(self) -> None:
        self._copied, self._next_turn = 0, None
        for _ in self._work:
            self._next_turn = self._loop.call_soon(self._go_on)
            return

    def _send_all(self) -> Generator[None, None, None]:
        """Write what waits; yields where the loop should have a turn."""
        while self._waiting:
            frame, streams, together = self._waiting[0]  # it stays there meanwhile: what is sent then waits behind it
            yield from self._send_one(frame, streams, together)
            self._waiting.popleft()

    def _send_one(
        self, frame: Frame, streams: Mapping[int, DriverStream], together: bool
    ) -> Generator[None, None, None]:
        beside: list[Buffer] = []
        told = bytearray()
        for place, buffer in enumerate(frame.buffers):
            nbytes = memoryview(buffer).nbytes
            target = self._target(frame, place, nbytes, together)
            region = self._allocate(nbytes, streams) if nbytes >= LARGE else None
            if region is None:
                beside.append(buffer)
                if target is not Target.HOST:
                    told += _told(Piece(0, place, 0, 0, 0, 0, Target.DEVICE))
                continue
            source, memory = memoryview(buffer).cast("B"), self._memory[region.begin :]
            for at in range(0, nbytes, PIECE):
                if self._copied >= PIECE:
                    if told:
                        _write([told], streams)
                        told = bytearray()
                    yield
                size = min(PIECE, nbytes - at)
                memory[at : at + size] = source[at : at + size]
                self._copied += size
                if target is not Target.TOGETHER:
                    told += _told(Piece(region.number, place, region.begin, nbytes, at, size, target))
            if target is Target.TOGETHER:
                told += _told(Piece(region.number, place, region.begin, nbytes, 0, nbytes, target))
        head, *pieces = msgspec.structs.replace(frame, buffers=beside).pack()
        _write([told + head, *pieces], streams)

    def _target(self, frame: Frame, place: int, nbytes: int, together: bool) -> Target:
        if not self._to_device or frame.kind is not FrameKind.CALL or nbytes < ON_DEVICE:
            return Target.HOST
        if not isinstance(frame.buffers, Buffers) or place not in frame.buffers.tensors:
            return Target.HOST
        return Target.TOGETHER if together else Target.DEVICE

    def _allocate(self, nbytes: int, streams: Mapping[int, DriverStream]) -> Region | None:
        self._arena.reclaim(self._copied_by_rank)
        ranks = [rank for rank, stream in streams.items() if not stream.ended]
        return self._arena.allocate(nbytes, ranks)


class ArgumentReceiver:
    """A rank's half.

    Args:
        descriptor: of the memory, inherited.
        capacity: of the arena.
        rank: this one.
        max_frame_bytes: a frame whose buffers are larger together is refused before memory is allocated.
    """

    def __init__(self, descriptor: int, capacity: int, rank: int, max_frame_bytes: int) -> None:
        self._shared = RankMemory(descriptor)
        self._capacity = capacity
        self._rank = rank
        self._max_frame_bytes = max_frame_bytes
        self._buffers: dict[int, _Growing] = {}
        self._for_device: set[int] = set()
        self._store = BufferStore(capacity)
        self.place_on("cpu", None)
        self._fence = threading.Lock()
        self._fence.acquire()

    def place_on(self, device: str, group: Any) -> None:
        """From now on this is the rank's device, and `group` all ranks' process group; see `StagedReader`."""
        self._device = device
        self._staged = StagedReader(self._shared, device, self._rank, group)

    def leave(self) -> None:
        """Use the process group no longer."""
        self._staged.close()

    def take(self, frame: Frame) -> None:
        """Copy a piece out.  Raises WireError where it is not where it may be."""
        piece = Piece.unpack(frame.body)
        if piece.target != Target.HOST:
            self._for_device.add(piece.place)
        if piece.size == 0:
            return
        growing = self._buffers.get(piece.place)
        if growing is None:
            self._refuse_oversize(piece)
            whole = piece.target == Target.TOGETHER
            memory = memoryview(b"") if whole else self._store.take(piece.nbytes)
            growing = self._buffers[piece.place] = _Growing(memory, piece.nbytes)
        end = piece.at + piece.size
        if piece.at != growing.filled or end > growing.nbytes or piece.begin + end > self._capacity:
            raise WireError(
                f"{piece} does not fit: {growing.filled} of {growing.nbytes} bytes are there, "
                f"and the arena has {self._capacity}"
            )
        if piece.target == Target.TOGETHER:
            growing.memory = self._read_together(piece)
        else:
            shared = memoryview(self._shared.mapped(_WORDS + self._capacity))[_WORDS + piece.begin :]
            growing.memory[piece.at : end] = shared[piece.at : end]
        growing.filled = end
        if end == growing.nbytes:
            self._copied(piece.number)

    def complete(self, frame: Frame) -> Frame:
        """The frame that the pieces belong to, with all its buffers.  Raises WireError where they are not whole."""
        if not self._buffers and not self._for_device:
            return frame
        buffers: list[Any] = list(frame.buffers)
        for place, growing in sorted(self._buffers.items()):
            if growing.filled < growing.nbytes or place > len(buffers):
                raise WireError(f"buffer {place} of {frame.kind.name} {frame.call_id} is not whole, or too far behind")
            buffers.insert(place, growing.memory)
        frame.buffers = buffers
        for place in self._for_device:
            if place >= len(buffers):
                raise WireError(
                    f"{frame.kind.name} {frame.call_id} has {len(buffers)} buffers, and none of place {place}"
                )
            torch: Any = importlib.import_module("torch")
            if not isinstance(buffers[place], torch.Tensor):
                buffers[place] = torch.frombuffer(buffers[place], dtype=torch.uint8).to(self._device)
        self._buffers, self._for_device = {}, set()
        return frame

    def _read_together(self, piece: Piece) -> Any:
        """A whole buffer on the device, which all ranks read at the same place in the order of their calls."""
        tensor, copied = self._staged.read(_WORDS + piece.begin, piece.nbytes)
        if copied is not None:
            copied.synchronize()  # asleep, for as long as a copy from pinned memory takes
        return tensor.clone() if self._device == "cpu" else tensor

    def _copied(self, number: int) -> None:
        """Have the driver know that this rank has copied a region."""
        # all that was read has been, for other cores too, before the driver may learn of it (release, then acquire)
        self._fence.release()
        self._fence.acquire()
        memoryview(self._shared.mapped(_WORDS + self._capacity))[:_WORDS].cast("Q")[self._rank] = number

    def _refuse_oversize(self, piece: Piece) -> None:
        size = sum(growing.nbytes for growing in self._buffers.values()) + piece.nbytes
        if size > self._max_frame_bytes:
            raise WireError(f"the next frame announces {size} bytes; max_frame_bytes is {self._max_frame_bytes}")


class _Growing(msgspec.Struct):
    """A buffer that is being copied out.

    Attributes:
        memory: where to; a tensor of bytes where it is on the device.
        nbytes: of the whole.
        filled: how many of them are there.
    """

    memory: Any
    nbytes: int
    filled: int = 0


def _told(piece: Piece) -> bytes:
    return bytes(Frame(FrameKind.PIECE, body=piece.pack()).pack()[0])


def _is_large(buffer: Buffer) -> bool:
    return memoryview(buffer).nbytes >= LARGE


def _write(pieces: list[Buffer], streams: Mapping[int, DriverStream]) -> None:
    for stream in streams.values():
        stream.send(pieces)
