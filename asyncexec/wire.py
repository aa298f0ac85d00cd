"""Frames: what travels between the driver and a rank, and the parser that reads them.

    header (48 bytes, little-endian) | body | buffer lengths (8 bytes each) | buffer | buffer | ...

The body is small and encoded (msgpack or pickle, see `asyncexec.codec`); buffers carry the memory of tensors, arrays
and byte strings as it is.  Parser and packer do no I/O: each side feeds them from whatever it reads.
"""

import enum
import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec

from asyncexec.errors import WireError

Buffer: TypeAlias = bytes | bytearray | memoryview


class Buffers(list[Buffer]):
    """Memory to send beside a message.

    Attributes:
        tensors: which of it, by index, is a tensor's: a transport may put that on the rank's device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()


MAGIC = 0xAE5C
VERSION = 2
ALL_RANKS = -1
NO_RANK = -2

_HEADER = struct.Struct("<HBBHBxIIQIiQQ")
HEADER_SIZE = _HEADER.size

READ_SIZE = 1 << 16
"""How much to read at once where no large part is wanted."""

_LARGE = READ_SIZE
"""Parts from this size on are received into memory of their own."""

MAX_BUFFERS = 1 << 16


class FrameKind(enum.IntEnum):
    """What a frame is for."""

    START = 1
    """Driver to rank: construct the worker."""
    CALL = 2
    """Driver to rank: run a method."""
    STOP = 3
    """Driver to rank: finish what was sent before, then leave."""
    REPLY = 4
    """Rank to driver: the method's result."""
    ERROR = 5
    """Rank to driver: the method raised."""
    SKIPPED = 6
    """Rank to driver: not run, because an earlier pipeline stage of the same call failed and reports why."""
    INSPECT = 7
    """Driver to a rank's side thread: what is the rank doing?  With a body, tell the stacks of its threads too."""
    REPORT = 8
    """A rank's side thread to the driver: this."""
    DONE = 9
    """Rank to driver: the method ran, and its output is not wanted; sent only where the call asks for it."""
    PIECE = 10
    """Between the halves of a transport: a part of the next frame lies in memory that they share."""


_KINDS = {int(kind): kind for kind in FrameKind}


class Frame(msgspec.Struct, eq=False):
    """One message.

    Attributes:
        kind: what it is for.
        call_id: the call it belongs to, counted from 1 within an epoch.
        epoch: which set of ranks the call belongs to.
        method: the method's number in the codec that both ends agreed on; in a START, that of `execute_model`.
        reply_to: in a CALL, the one rank whose output is wanted, `ALL_RANKS` or `NO_RANK`; others answer only errors.
        acknowledge: in a CALL, whether the others say so when they are done.
        trace: in a CALL, whether the ranks keep note of when they did what.
        started_ns: in a reply, when the rank took the call up (CLOCK_MONOTONIC, nanoseconds).
        ended_ns: in a reply, when the worker's method had returned (and a deferred output was there).
        body: the encoded part.
        buffers: memory that travels beside it.
    """

    kind: FrameKind
    call_id: int = 0
    epoch: int = 0
    method: int = 0
    reply_to: int = ALL_RANKS
    started_ns: int = 0
    ended_ns: int = 0
    body: Buffer = b""
    buffers: Sequence[Buffer] = ()
    acknowledge: bool = False
    trace: bool = False

    @property
    def size(self) -> int:
        """Bytes of body and buffers together."""
        size = len(self.body)
        for buffer in self.buffers:
            size += memoryview(buffer).nbytes
        return size

    def refusal(self, max_frame_bytes: int) -> str | None:
        """Why the other side would refuse this frame, by its size or its number of buffers; None if it would not."""
        count = len(self.buffers)
        size = self.size + 8 * count
        if size > max_frame_bytes:
            return f"are {size} bytes; max_frame_bytes is {max_frame_bytes}"
        if count > MAX_BUFFERS:
            return f"have {count} arrays, tensors or byte strings; at most {MAX_BUFFERS} are allowed"
        if len(self.body) >= 1 << 32:
            return f"have {len(self.body)} bytes beside arrays and tensors; at most {(1 << 32) - 1} are allowed"
        return None

    def pack(self) -> list[Buffer]:
        """The frame as pieces to write one after the other: one for header, body and lengths, then each buffer."""
        header = _HEADER.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.method,
            self.acknowledge | self.trace << 1,
            len(self.body),
            len(self.buffers),
            self.call_id,
            self.epoch,
            self.reply_to,
            self.started_ns,
            self.ended_ns,
        )
        if not self.buffers:
            return [header + self.body]
        views = [memoryview(buffer) for buffer in self.buffers]
        lengths = struct.pack(f"<{len(views)}Q", *(view.nbytes for view in views))
        return [b"".join((header, self.body, lengths)), *(view.cast("B") for view in views if view.nbytes)]


class FrameParser:
    """Cuts a byte stream into frames, whatever pieces it arrives in.

    Small parts are handed in by `feed`.  While `wanted` is not None, a large part is under way: receive into that
    memory and say how much by `received`, which spares the copy.

    Args:
        max_frame_bytes: a frame whose body and buffers are larger together is refused before memory is allocated.
        on_frame: called with each whole frame.
    """

    def __init__(self, max_frame_bytes: int, on_frame: Callable[[Frame], None]) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._on_frame = on_frame
        self._rest = b""
        self.wanted: memoryview | None = None
        self._large = memoryview(b"")
        self._section = HEADER_SIZE
        self._frame: Frame | None = None
        self._buffer_count = 0
        self._lengths: tuple[int, ...] = ()
        self._buffers: list[Buffer] = []

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun and not ended: an end of stream now would cut it."""
        return self._frame is not None or bool(self._rest)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream; not while a large part is `wanted`.

        Raises:
            WireError: the stream is not one of ours, of another version, or announces too large a frame.  The
                frames before it have been given out.
        """
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at, end = 0, self._section
        while end <= len(data):
            self._take(data[at:end])
            at, end = end, end + self._section
        if at == len(data):
            return
        if self._section < _LARGE:
            self._rest = data[at:]
            return
        # a part that is large, and not all there yet, gets memory of its own
        self._large = memoryview(bytearray(self._section))
        self._large[: len(data) - at] = memoryview(data)[at:]
        self.wanted = self._large[len(data) - at :]

    def received(self, count: int) -> None:
        """Take note of `count` bytes received into `wanted`.  Raises WireError as `feed` does."""
        if self.wanted is None:
            raise ValueError("no memory was wanted")
        self.wanted = self.wanted[count:]
        if not self.wanted:
            self.wanted = None
            whole, self._large = self._large, memoryview(b"")  # which would keep the memory until the next large part
            self._take(whole)

    def _take(self, section: Buffer) -> None:
        """Use a whole section: header, body with lengths, or one buffer.  Gives the frame out where it ends it."""
        frame = self._frame
        if frame is None:
            magic, version, kind, method, flags, body, count, call_id, epoch, reply_to, started, ended = _HEADER.unpack(
                section
            )
            announced = body + 8 * count
            if magic != MAGIC or version != VERSION or kind not in _KINDS or count > MAX_BUFFERS:
                raise WireError(_refusal(magic, version, kind, count))
            if announced > self._max_frame_bytes:
                raise WireError(self._oversize(announced))
            frame = Frame(_KINDS[kind], call_id, epoch, method, reply_to, started, ended)
            if flags:
                frame.acknowledge, frame.trace = bool(flags & 1), bool(flags & 2)
            if announced:
                self._frame, self._section, self._buffer_count = frame, announced, count
                return
        elif not self._buffer_count:
            frame.body = section
        elif not self._take_part(frame, section):
            return
        self._frame, self._section = None, HEADER_SIZE
        self._on_frame(frame)

    def _take_part(self, frame: Frame, section: Buffer) -> bool:
        """Use the body with the lengths, or a buffer; returns whether it was the frame's last part that has bytes."""
        if not self._lengths:
            body = len(section) - 8 * self._buffer_count
            self._lengths = struct.unpack(f"<{self._buffer_count}Q", section[body:])
            if (announced := body + sum(self._lengths)) > self._max_frame_bytes:
                raise WireError(self._oversize(announced))
            frame.body = section[:body]
        else:
            self._buffers.append(section if isinstance(section, memoryview) else bytearray(section))
        while len(self._buffers) < len(self._lengths):
            self._section = self._lengths[len(self._buffers)]
            if self._section:
                return False
            self._buffers.append(b"")
        frame.buffers, self._buffers, self._lengths = tuple(self._buffers), [], ()
        return True

    def _oversize(self, size: int) -> str:
        return f"the frame announces {size} bytes; max_frame_bytes is {self._max_frame_bytes}"


def _refusal(magic: int, version: int, kind: int, buffers: int) -> str:
    """What is wrong with a header."""
    if magic != MAGIC:
        return f"not a frame: it begins with 0x{magic:04x}, a frame with 0x{MAGIC:04x}"
    if version != VERSION:
        return f"the frame is of wire version {version}; this side speaks version {VERSION}"
    if kind not in _KINDS:
        return f"unknown frame kind {kind}; valid: {', '.join(f'{k} {v.name}' for k, v in _KINDS.items())}"
    return f"the frame announces {buffers} buffers; at most {MAX_BUFFERS} are allowed"
