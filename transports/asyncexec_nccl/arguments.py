"""Large arguments from the driver to the ranks: written once into memory that all of them share.

The driver copies a buffer there piece by piece.  After each piece it tells the ranks over their sockets, which they
wait on anyway, so that they copy one piece out while it writes the next.  Then the frame follows with the buffers that
are small.  What a rank gets is memory of its own: the worker may write to it, and keep it.

How far each rank has come it writes into the shared memory, where the driver looks before it allocates: nobody waits
for that, and nobody is told.  Where there is no room, a buffer goes beside its frame over the sockets.
"""

import asyncio
import collections
import struct
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import msgspec

from asyncexec.errors import WireError
from asyncexec.wire import Buffer, Frame, FrameKind
from asyncexec_nccl.arena import Arena, Region
from asyncexec_nccl.buffer_store import BufferStore
from asyncexec_nccl.shared_memory import RankMemory, SharedMemory
from asyncexec_nccl.stream import DriverStream

LARGE = 1 << 16
"""Bytes from which a buffer is worth it: measured by benchmarks/large_payloads.py."""

PIECE = 1 << 21
"""Bytes that are copied before the ranks are told, and in one turn of the driver's loop: some 0.1 ms."""

_WORDS = 1 << 16
"""Bytes before the arena: one unsigned number of 8 bytes for each rank, the last region that it has copied."""


class Piece(NamedTuple):
    """The body of a PIECE frame: a part of a buffer of the next frame lies in the shared memory.

    Attributes:
        number: of the buffer's region.
        place: of the buffer among those of the frame.
        begin: of the region in the arena.
        nbytes: of the whole buffer.
        at: where in the buffer the piece begins; pieces come in order.
        size: of the piece.
    """

    number: int
    place: int
    begin: int
    nbytes: int
    at: int
    size: int

    @classmethod
    def unpack(cls, body: Buffer) -> "Piece":
        """The piece that `pack` packed."""
        if len(body) != _PIECE.size:
            raise WireError(f"the body of a PIECE has {len(body)} bytes; it has {_PIECE.size}")
        return cls(*_PIECE.unpack(body))

    def pack(self) -> bytes:
        """As bytes."""
        return _PIECE.pack(*self)


_PIECE = struct.Struct("<6Q")


class ArgumentSender:
    """The driver's half.  Never blocks for longer than a piece takes to copy.

    Args:
        loop: the event loop on which everything is done.
        capacity: bytes that may be in use at once; 0 leaves everything to the sockets.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, capacity: int) -> None:
        self._loop = loop
        self._shared = SharedMemory("asyncexec-arguments")
        memory = self._shared.memory(_WORDS + capacity)  # addresses alone, until it is written to
        self._copied_by_rank, self._memory = memory[:_WORDS].cast("Q"), memory[_WORDS:]
        self._arena = Arena(capacity)
        self._waiting: collections.deque[tuple[Frame, Mapping[int, DriverStream]]] = collections.deque()
        self._work: Iterator[None] = iter(())
        self._next_turn: asyncio.Handle | None = None
        self._copied = 0  # in this turn of the loop

    @property
    def descriptor(self) -> int:
        """Of the memory, for the ranks to inherit."""
        return self._shared.descriptor

    def takes(self, frame: Frame) -> bool:
        """Whether a frame is to be sent here: it has a large buffer, or one that has is not written yet."""
        return bool(self._waiting) or any(_is_large(buffer) for buffer in frame.buffers)

    def send(self, frame: Frame, streams: Mapping[int, DriverStream]) -> None:
        """Send a frame to ranks, in order behind what was sent here before."""
        self._waiting.append((frame, streams))
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
        self._shared.close()

    def _go_on(self) -> None:
        self._copied, self._next_turn = 0, None
        for _ in self._work:
            self._next_turn = self._loop.call_soon(self._go_on)
            return

    def _send_all(self) -> Iterator[None]:
        """Write what waits; yields where the loop should have a turn."""
        while self._waiting:
            frame, streams = self._waiting[0]  # it stays there meanwhile: what is sent then waits behind it
            yield from self._send_one(frame, streams)
            self._waiting.popleft()

    def _send_one(self, frame: Frame, streams: Mapping[int, DriverStream]) -> Iterator[None]:
        beside: list[Buffer] = []
        told = bytearray()
        for index, buffer in enumerate(frame.buffers):
            region = self._allocate(buffer, streams) if _is_large(buffer) else None
            if region is None:
                beside.append(buffer)
                continue
            source, target = memoryview(buffer).cast("B"), self._memory[region.begin :]
            for at in range(0, len(source), PIECE):
                if self._copied >= PIECE:
                    _write([told], streams)
                    told = bytearray()
                    yield
                size = min(PIECE, len(source) - at)
                target[at : at + size] = source[at : at + size]
                self._copied += size
                piece = Piece(region.number, index, region.begin, len(source), at, size)
                told += Frame(FrameKind.PIECE, body=piece.pack()).pack()[0]
        head, *pieces = msgspec.structs.replace(frame, buffers=beside).pack()
        _write([told + head, *pieces], streams)

    def _allocate(self, buffer: Buffer, streams: Mapping[int, DriverStream]) -> Region | None:
        self._arena.reclaim(self._copied_by_rank)
        ranks = [rank for rank, stream in streams.items() if not stream.ended]
        return self._arena.allocate(memoryview(buffer).nbytes, ranks)


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
        self._store = BufferStore(capacity)
        self._fence = threading.Lock()
        self._fence.acquire()

    def take(self, frame: Frame) -> None:
        """Copy a piece out.  Raises WireError where it is not where it may be."""
        piece = Piece.unpack(frame.body)
        growing = self._buffers.get(piece.place)
        if growing is None:
            self._refuse_oversize(piece)
            growing = self._buffers[piece.place] = _Growing(self._store.take(piece.nbytes), 0)
        end = piece.at + piece.size
        if piece.at != growing.filled or end > len(growing.memory) or piece.begin + end > self._capacity:
            raise WireError(
                f"{piece} does not fit: {growing.filled} of {len(growing.memory)} bytes are there, "
                f"and the arena has {self._capacity}"
            )
        shared = memoryview(self._shared.mapped(_WORDS + self._capacity))
        begin = _WORDS + piece.begin
        growing.memory[piece.at : end] = shared[begin + piece.at : begin + end]
        growing.filled = end
        if end == len(growing.memory):
            # all that was read has been, for other cores too, before the driver may learn of it (release, then acquire)
            self._fence.release()
            self._fence.acquire()
            shared[:_WORDS].cast("Q")[self._rank] = piece.number

    def complete(self, frame: Frame) -> Frame:
        """The frame that the pieces belong to, with all its buffers.  Raises WireError where they are not whole."""
        if self._buffers:
            buffers = list(frame.buffers)
            for index, growing in sorted(self._buffers.items()):
                if growing.filled < len(growing.memory) or index > len(buffers):
                    raise WireError(
                        f"buffer {index} of {frame.kind.name} {frame.call_id} is not whole, or too far behind"
                    )
                buffers.insert(index, growing.memory)
            frame.buffers = buffers
            self._buffers = {}
        return frame

    def _refuse_oversize(self, piece: Piece) -> None:
        size = sum(len(growing.memory) for growing in self._buffers.values()) + piece.nbytes
        if size > self._max_frame_bytes:
            raise WireError(f"the next frame announces {size} bytes; max_frame_bytes is {self._max_frame_bytes}")


class _Growing(msgspec.Struct):
    """A buffer that is being copied out, and how many bytes of it are there."""

    memory: memoryview
    filled: int


def _is_large(buffer: Buffer) -> bool:
    return memoryview(buffer).nbytes >= LARGE


def _write(pieces: list[Buffer], streams: Mapping[int, DriverStream]) -> None:
    for stream in streams.values():
        stream.send(pieces)
