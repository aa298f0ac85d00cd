"""Frames: what travels between the driver and a rank, and the parser that reads them.

    header (48 bytes, little-endian) | body | buffer lengths (8 bytes each) | buffer | buffer | ...

The body is small and encoded (msgpack or pickle, see `asyncexec.codec`); buffers carry the memory of tensors, arrays
and byte strings as it is.  Parser and packer do no I/O: each side feeds them from whatever it reads.
"""

import enum
import struct
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import msgspec

from asyncexec.errors import WireError

Buffer: TypeAlias = bytes | bytearray | memoryview

MAGIC = 0xAE5C
VERSION = 1
ALL_RANKS = -1

_HEADER = struct.Struct("<HBBHHIIQIiQQ")
HEADER_SIZE = _HEADER.size
_SCRATCH_SIZE = 1 << 17
_DIRECT_FROM = _SCRATCH_SIZE // 2
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


_KINDS = {int(kind): kind for kind in FrameKind}


class Frame(msgspec.Struct, eq=False):
    """One message.

    Attributes:
        kind: what it is for.
        call_id: the call it belongs to, counted from 1 within an epoch.
        epoch: which set of ranks the call belongs to.
        method: the method's number in the codec that both ends agreed on.
        reply_to: in a CALL, the one rank whose output is wanted, or `ALL_RANKS`; the others answer only errors.
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

    @property
    def size(self) -> int:
        """Bytes of body and buffers together."""
        return len(self.body) + sum(memoryview(buffer).nbytes for buffer in self.buffers)

    def pack(self) -> list[Buffer]:
        """The frame as pieces to write one after the other: one for header, body and lengths, then each buffer."""
        header = _HEADER.pack(
            MAGIC,
            VERSION,
            self.kind,
            self.method,
            0,
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

    Write received bytes into `space()`, then call `received(count)`.  Small parts are gathered in one scratch
    buffer; a large body or buffer is received straight into memory of its own.

    Args:
        max_frame_bytes: a frame whose body and buffers are larger together is refused before memory is allocated.
    """

    def __init__(self, max_frame_bytes: int) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._scratch = memoryview(bytearray(_SCRATCH_SIZE))
        self._start = 0
        self._end = 0
        self._direct: memoryview | None = None
        self._filled = 0
        self._section = HEADER_SIZE
        self._frame: Frame | None = None
        self._body_size: int | None = None
        self._buffer_count = 0
        self._lengths: tuple[int, ...] = ()
        self._buffers: list[Buffer] = []

    def space(self) -> memoryview:
        """Where the next received bytes go; never empty."""
        if self._direct is not None:
            return self._direct[self._filled :]
        return self._scratch[self._end :]

    def received(self, count: int) -> Iterator[Frame]:
        """Take note of `count` bytes written into `space()`; iterate over the frames that they complete.

        Raises:
            WireError: the stream is not one of ours, of another version, or announces too large a frame.  The
                frames before it have been given out.
        """
        if self._direct is None:
            self._end += count
        else:
            self._filled += count
        while (section := self._next_section()) is not None:
            frame = self._take(section)
            if frame is not None:
                yield frame

    @property
    def mid_frame(self) -> bool:
        """Whether a frame has begun and not ended: an end of stream now would cut it."""
        return self._frame is not None or self._end > self._start

    def _next_section(self) -> memoryview | None:
        """The next whole section (header, body with lengths, or buffer), or None until more bytes are there."""
        if self._direct is not None:
            if self._filled < self._section:
                return None
            section, self._direct = self._direct, None
            return section
        available = self._end - self._start
        if available >= self._section:
            section = self._scratch[self._start : self._start + self._section]
            self._start += self._section
            if self._start == self._end:
                self._start = self._end = 0
            return section
        if self._section > _DIRECT_FROM:
            self._direct = memoryview(bytearray(self._section))
            self._direct[:available] = self._scratch[self._start : self._end]
            self._filled = available
            self._start = self._end = 0
        elif self._start + self._section > _SCRATCH_SIZE:
            self._scratch[:available] = bytes(self._scratch[self._start : self._end])
            self._start, self._end = 0, available
        return None

    def _take(self, section: memoryview) -> Frame | None:
        """Use a whole section; returns the frame when it was the last one."""
        frame = self._frame
        if frame is None:
            self._take_header(section)
        elif self._body_size is not None:
            self._take_body(frame, self._body_size, section)
        else:
            self._buffers.append(_own(section))
        return self._advance()

    def _take_header(self, section: memoryview) -> None:
        magic, version, kind, method, _, body, buffers, call_id, epoch, reply_to, started, ended = _HEADER.unpack(
            section
        )
        if magic != MAGIC:
            raise WireError(f"not a frame: it begins with 0x{magic:04x}, a frame with 0x{MAGIC:04x}")
        if version != VERSION:
            raise WireError(f"the frame is of wire version {version}; this side speaks version {VERSION}")
        if kind not in _KINDS:
            raise WireError(
                f"unknown frame kind {kind}; valid: {', '.join(f'{k} {v.name}' for k, v in _KINDS.items())}"
            )
        if buffers > MAX_BUFFERS:
            raise WireError(f"the frame announces {buffers} buffers; at most {MAX_BUFFERS} are allowed")
        self._refuse_oversize(body + 8 * buffers)
        self._body_size = body
        self._buffer_count = buffers
        self._frame = Frame(_KINDS[kind], call_id, epoch, method, reply_to, started, ended)

    def _take_body(self, frame: Frame, body_size: int, section: memoryview) -> None:
        frame.body = _own(section[:body_size])
        self._lengths = struct.unpack(f"<{self._buffer_count}Q", section[body_size:])
        self._refuse_oversize(body_size + sum(self._lengths))
        self._body_size = None

    def _advance(self) -> Frame | None:
        """Set up the next section that has bytes; returns the frame when there is none."""
        frame = self._frame
        if frame is not None and self._body_size is not None:
            self._section = self._body_size + 8 * self._buffer_count
            if self._section:
                return None
            self._body_size = None
        while len(self._buffers) < len(self._lengths):
            self._section = self._lengths[len(self._buffers)]
            if self._section:
                return None
            self._buffers.append(b"")
        if frame is not None:
            frame.buffers = tuple(self._buffers)
        self._frame, self._section, self._lengths, self._buffers = None, HEADER_SIZE, (), []
        return frame

    def _refuse_oversize(self, size: int) -> None:
        if size > self._max_frame_bytes:
            raise WireError(f"the frame announces {size} bytes; max_frame_bytes is {self._max_frame_bytes}")


def _own(section: memoryview) -> Buffer:
    """Memory that outlives the scratch buffer: a large section has its own already, a small one is copied."""
    return section if section.nbytes > _DIRECT_FROM else bytearray(section)
