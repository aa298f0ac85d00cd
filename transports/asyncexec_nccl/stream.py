"""Frames over a connected stream socket."""

import asyncio
import collections
import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Sequence

from asyncexec.errors import WireError
from asyncexec.wire import READ_SIZE, Buffer, Frame, FrameParser

_PIECES_AT_ONCE = 512
"""Pieces given to one `sendmsg`; the kernel takes at most 1024 (IOV_MAX)."""

_READS_AT_ONCE = 16
"""Reads in a row from one socket, before the others have their turn."""


class DriverStream:
    """The driver's end: never blocks, and wakes only when there is something to read or room to write.

    It works on the socket directly: a frame leaves in the call that submits it, not in a later turn of the loop.

    Args:
        loop: the event loop that waits for the socket.
        connection: a connected stream socket; the stream owns it.
        max_frame_bytes: a larger incoming frame ends the stream.
        on_frame: called with each frame.
        on_end: called once, with None at the end of the stream or with the error that ended it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: socket.socket,
        max_frame_bytes: int,
        on_frame: Callable[[Frame], None],
        on_end: Callable[[Exception | None], None],
    ) -> None:
        connection.setblocking(False)
        self._loop = loop
        self._socket = connection
        self._parser = FrameParser(max_frame_bytes, on_frame)
        self._on_end = on_end
        self._unsent: collections.deque[memoryview] = collections.deque()
        self._ended = False
        loop.add_reader(connection, self.read)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes or goes."""
        return self._ended

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Write the pieces of a frame now, or when there is room; after the stream's end they are dropped."""
        if self._ended:
            return
        if self._unsent:
            self._unsent.extend(memoryview(piece) for piece in pieces)
            return
        try:
            rest = _write(self._socket, pieces)
        except ConnectionError:
            return  # the peer is gone: the read side learns of it, and says so
        if rest:
            self._unsent = rest
            self._loop.add_writer(self._socket, self._write_more)

    def read(self) -> None:
        """Take what has arrived; called by the loop, and once more when the peer's process has ended."""
        parser, connection = self._parser, self._socket
        for _ in range(_READS_AT_ONCE):
            if self._ended:
                return
            try:
                in_large_part = parser.wanted is not None
                count = _receive(connection, parser)
            except BlockingIOError:
                return
            except (ConnectionError, WireError) as error:
                self._end(error)
                return
            if count == 0:
                self._end(None)  # even within a frame: then its process was killed while it wrote
            if count < READ_SIZE and not in_large_part and parser.wanted is None:
                return  # there was no more

    def close(self) -> None:
        """Close the socket; `on_end` is not called any more."""
        if self._socket.fileno() >= 0:
            self._ended = True
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._unsent.clear()
            self._socket.close()

    def _write_more(self) -> None:
        try:
            _write_from(self._socket, self._unsent)
        except ConnectionError:
            self._unsent.clear()
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _end(self, error: Exception | None) -> None:
        self.close()
        self._on_end(error)


class RankStream:
    """The rank's end: reading blocks one thread, writing may be done by several.

    Args:
        connection: a connected stream socket; the stream owns it.
        max_frame_bytes: a larger incoming frame raises.
    """

    def __init__(self, connection: socket.socket, max_frame_bytes: int) -> None:
        connection.setblocking(True)  # whatever socket.setdefaulttimeout() was set to where it was made
        self._socket = connection
        self._received: collections.deque[Frame] = collections.deque()
        self._parser = FrameParser(max_frame_bytes, self._received.append)
        self._writing = threading.Lock()

    def receive(self) -> Frame | None:
        """Block until the next frame; None at the end of the stream.  Raises WireError where it is malformed."""
        while not self._received:
            try:
                count = _receive(self._socket, self._parser)
            except ConnectionError:
                return None
            if count == 0:
                return None
        return self._received.popleft()

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Block until the pieces of a frame are written.  Raises ConnectionError when the peer is gone."""
        with self._writing:
            rest = _write(self._socket, pieces)
            while rest:
                _write_from(self._socket, rest)

    def send_what_fits(self, pieces: Sequence[Buffer]) -> Sequence[Buffer]:
        """Write as much as the socket takes now; returns the rest.  Raises ConnectionError when the peer is gone."""
        with self._writing:
            return _write(self._socket, pieces, socket.MSG_DONTWAIT) or ()

    def end_writing(self) -> None:
        """Have the peer find the end of the stream behind what was written."""
        with contextlib.suppress(OSError):  # already reset by the peer
            self._socket.shutdown(socket.SHUT_WR)

    def wait_for_end(self, limit: float) -> None:
        """Block until the peer has ended its writing or is gone, or for `limit` seconds; what it wrote is dropped."""
        until = time.monotonic() + limit
        with contextlib.suppress(OSError):  # of the limit, or reset by the peer
            while (left := until - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(READ_SIZE):
                    return

    def close(self) -> None:
        """Close the socket, which ends a `receive` of the peer."""
        with contextlib.suppress(OSError):  # already reset by the peer
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _receive(connection: socket.socket, parser: FrameParser) -> int:
    """Receive once, into the large part that is under way if there is one; returns how many bytes came."""
    if parser.wanted is not None:
        count = connection.recv_into(parser.wanted)
        parser.received(count)
        return count
    data = connection.recv(READ_SIZE)
    parser.feed(data)
    return len(data)


def _write(connection: socket.socket, pieces: Sequence[Buffer], flags: int = 0) -> collections.deque[memoryview] | None:
    """Write what the socket takes in one call; returns the rest, if there is one."""
    if len(pieces) == 1:  # most frames
        try:
            sent = connection.send(pieces[0], flags)
        except BlockingIOError:
            sent = 0
        return collections.deque([memoryview(pieces[0])[sent:]]) if sent < len(pieces[0]) else None
    rest = collections.deque(memoryview(piece) for piece in pieces)
    _write_from(connection, rest, flags)
    return rest


def _write_from(connection: socket.socket, pieces: collections.deque[memoryview], flags: int = 0) -> None:
    """Write what the socket takes in one call, and remove it."""
    try:
        sent = connection.sendmsg(list(itertools.islice(pieces, _PIECES_AT_ONCE)), (), flags)
    except BlockingIOError:
        return
    while pieces and sent >= len(pieces[0]):
        sent -= len(pieces.popleft())
    if sent:
        pieces[0] = pieces[0][sent:]
