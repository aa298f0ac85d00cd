"""Intermediate tensors from one pipeline stage to the next, rank to rank.

A hop is one frame on a socket pair between the two ranks: names, dtypes and shapes in its body, the tensors' memory
beside it.  The receiver needs no round trip to learn their sizes.

A neighbour that is gone is not an error here: its death explains itself to the driver.
"""

import queue
import threading
from collections.abc import Mapping
from typing import Any

from asyncexec.errors import PayloadError
from asyncexec.tensors import decode_tensors, encode_tensors
from asyncexec.wire import Buffer, Frame, FrameKind
from asyncexec_nccl.stream import RankStream


class Hop:
    """A rank's end of what joins it to a rank of a neighbouring stage.

    Args:
        stream: the connection to it.
    """

    def __init__(self, stream: RankStream) -> None:
        self.stream = stream

    def let_go(self) -> None:
        """Use it no more, once what is under way is written; before `close`."""

    def close(self) -> None:
        """End it."""
        self.stream.close()


class HopSender(Hop):
    """The way to the next stage.

    What does not fit into the socket's buffer is written by a thread of its own, so that this stage goes on with its
    next step while the next stage is still busy with the one before.
    """

    def __init__(self, stream: RankStream, max_frame_bytes: int) -> None:
        super().__init__(stream)
        self._max_frame_bytes = max_frame_bytes
        self._waiting: queue.Queue[list[Buffer] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def send(self, call_id: int, tensors: Mapping[str, Any] | None, replicated: frozenset[str] = frozenset()) -> None:
        """Send a step's tensors, or None to say that there are none; they may be overwritten afterwards.

        They go whole, `replicated` or not: through host memory, putting parts together would cost more.

        Raises:
            PayloadError: they are larger than a frame may be; nothing was sent.
        """
        if tensors is None:
            frame = Frame(FrameKind.SKIPPED, call_id)
        else:
            body, buffers = encode_tensors(tensors)
            frame = Frame(FrameKind.CALL, call_id, body=body, buffers=buffers)
            if refusal := frame.refusal(self._max_frame_bytes):
                raise PayloadError(f"the intermediate tensors {refusal}")
        self.write(frame)

    def write(self, frame: Frame) -> None:
        """Write a frame, the part that does not fit later on."""
        pieces = frame.pack()
        try:
            rest = pieces if self._waiting.unfinished_tasks else self.stream.send_what_fits(pieces)
        except ConnectionError:
            return  # as above: the next stage is gone
        if rest:
            self._finish_later([bytes(piece) for piece in rest])

    def let_go(self) -> None:
        """Send nothing any more; returns when everything is written."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _finish_later(self, pieces: list[Buffer]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name="asyncexec-hop", daemon=True)
            self._thread.start()
        self._waiting.put(pieces)

    def _write(self) -> None:
        while (pieces := self._waiting.get()) is not None:
            try:
                self.stream.send(pieces)
            except ConnectionError:
                return  # as above
            self._waiting.task_done()


class HopReceiver(Hop):
    """The way from the previous stage.

    Args:
        stream: the connection to it.
        device: where the tensors are to be.
    """

    def __init__(self, stream: RankStream, device: str = "cpu") -> None:
        super().__init__(stream)
        self._device = device
        self._early: Frame | None = None

    def receive(self, call_id: int) -> Mapping[str, Any] | None:
        """Block until the step's tensors are there; None when there will be none."""
        while (frame := self._next()) is not None:
            if frame.call_id < call_id:
                self.drop(frame)
                continue
            if frame.call_id > call_id:
                self._early = frame  # the previous stage did not run this step
                return None
            return None if frame.kind is FrameKind.SKIPPED else self.take(frame)
        return None

    def take(self, frame: Frame) -> Mapping[str, Any]:
        """The tensors of a frame."""
        return decode_tensors(frame.body, frame.buffers, self._device)

    def drop(self, frame: Frame) -> None:
        """Do without a frame of a step that this stage could not run."""

    def _next(self) -> Frame | None:
        if self._early is not None:
            frame, self._early = self._early, None
            return frame
        return self.stream.receive()
