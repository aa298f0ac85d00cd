"""Frames over a connected stream socket."""

import asyncio
import collections
import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Sequence

from asyncexec.errors import WireError
from asyncexec.wire import Buffer, Frame, FrameParser

_PIECES_AT_ONCE = 64
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
        self._parser = FrameParser(max_frame_bytes)
        self._on_frame = on_frame
        self._on_end = on_end
        self._unsent: collections.deque[memoryview] = collections.deque()
        self._ended = False
        loop.add_reader(connection, self.read)

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Write the pieces of a frame now, or when there is room; after the stream's end they are dropped."""
        if self._ended:
            return
        if self._unsent:
            self._unsent.extend(map(memoryview, pieces))
            return
        try:
            sent = self._socket.sendmsg(pieces[:_PIECES_AT_ONCE])
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            return  # the peer is gone: the read side learns of it, and says so
        rest = _after(pieces, sent)
        if rest:
            self._unsent.extend(rest)
            self._loop.add_writer(self._socket, self._write)

    def read(self) -> None:
        """Take what has arrived; called by the loop, and once more when the peer's process has ended."""
        for _ in range(_READS_AT_ONCE):
            if self._ended:
                return
            space = self._parser.space()
            try:
                count = self._socket.recv_into(space)
                for frame in self._parser.received(count):
                    self._on_frame(frame)
            except BlockingIOError:
                return
            except (ConnectionError, WireError) as error:
                self._end(error)
                return
            if count == 0:
                self._end(WireError("the connection ended within a frame") if self._parser.mid_frame else None)
            if count < space.nbytes:
                return

    def close(self) -> None:
        """Close the socket; `on_end` is not called any more."""
        if self._socket.fileno() >= 0:
            self._ended = True
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._unsent.clear()
            self._socket.close()

    def _write(self) -> None:
        try:
            sent = self._socket.sendmsg(list(itertools.islice(self._unsent, _PIECES_AT_ONCE)))
        except BlockingIOError:
            return
        except ConnectionError:
            self._unsent.clear()
            sent = 0
        rest = _after(self._unsent, sent)
        self._unsent = collections.deque(rest)
        if not rest:
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
        self._socket = connection
        self._parser = FrameParser(max_frame_bytes)
        self._received: collections.deque[Frame] = collections.deque()
        self._writing = threading.Lock()

    def receive(self) -> Frame | None:
        """Block until the next frame; None at the end of the stream.  Raises WireError where it is malformed."""
        while not self._received:
            try:
                count = self._socket.recv_into(self._parser.space())
            except ConnectionError:
                return None
            if count == 0:
                return None
            self._received.extend(self._parser.received(count))
        return self._received.popleft()

    def send(self, frame: Frame) -> None:
        """Block until the frame is written.  Raises ConnectionError when the peer is gone."""
        self.send_pieces(frame.pack())

    def send_pieces(self, pieces: Sequence[Buffer]) -> None:
        """Block until the pieces of a frame are written.  Raises ConnectionError when the peer is gone."""
        with self._writing:
            while pieces:
                pieces = _after(pieces, self._socket.sendmsg(pieces[:_PIECES_AT_ONCE]))

    def send_what_fits(self, pieces: Sequence[Buffer]) -> Sequence[Buffer]:
        """Write as much as the socket takes now; returns the rest.  Raises ConnectionError when the peer is gone."""
        with self._writing:
            try:
                return _after(pieces, self._socket.sendmsg(pieces[:_PIECES_AT_ONCE], (), socket.MSG_DONTWAIT))
            except BlockingIOError:
                return pieces

    def close(self) -> None:
        """Close the socket, which ends a `receive` of the peer."""
        with contextlib.suppress(OSError):  # already reset by the peer
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _after(pieces: Sequence[Buffer] | collections.deque[memoryview], sent: int) -> list[memoryview]:
    """What is left of `pieces` behind the first `sent` bytes."""
    rest: list[memoryview] = []
    for piece in pieces:
        size = len(piece)
        if sent < size:
            rest.append(memoryview(piece)[sent:])
        sent = max(sent - size, 0)
    return rest
