"""A rank's place among the others, and the descriptors that join it to them: passed over a socket, any number of times.

The descriptors travel beside the message (SCM_RIGHTS of unix(7)).  A rank can so be joined to others that did not exist
when it was spawned.
"""

import os
import socket
from typing import NamedTuple

import msgspec

_LARGEST = 1 << 12
_MOST_DESCRIPTORS = 3


class Joints(NamedTuple):
    """The descriptors that come with a layout; the receiver owns them.

    Attributes:
        store: of the memory that the process groups meet in.
        previous, next: of the sockets to the neighbouring pipeline stages; None where there is none.
    """

    store: int
    previous: int | None
    next: int | None


class Layout(msgspec.Struct, frozen=True):
    """Where a rank is.

    Attributes:
        tensor_parallel_size, pipeline_parallel_size: of all ranks.
        has_previous, has_next: whether there is a pipeline stage before it, and behind it.
    """

    tensor_parallel_size: int
    pipeline_parallel_size: int
    has_previous: bool
    has_next: bool

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @classmethod
    def with_joints(cls, tensor_parallel_size: int, pipeline_parallel_size: int, joints: Joints) -> "Layout":
        """The layout that comes with these descriptors."""
        has_previous, has_next = joints.previous is not None, joints.next is not None
        return cls(tensor_parallel_size, pipeline_parallel_size, has_previous, has_next)


def send_layout(connection: socket.socket, layout: Layout, joints: Joints) -> None:
    """Tell a rank its place over a socket that does not block.

    Raises OSError where the rank is gone, or takes no messages any more.
    """
    socket.send_fds(connection, [msgspec.json.encode(layout)], [fd for fd in joints if fd is not None])


def receive_layout(connection: socket.socket) -> tuple[Layout, Joints]:
    """The place told last, over a socket that does not block: a rank is told before it is asked to join.

    Places told earlier that were never taken up are dropped.

    Raises:
        BlockingIOError: none has been told.
    """
    latest: tuple[bytes, list[int]] | None = None
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(connection, _LARGEST, _MOST_DESCRIPTORS)
        except BlockingIOError:
            if latest is None:
                raise
            break
        if not message:
            raise ConnectionError("the driver is gone")
        for descriptor in latest[1] if latest else ():
            os.close(descriptor)
        latest = message, descriptors
    layout = msgspec.json.decode(latest[0], type=Layout)
    store, *sockets = latest[1]
    os.set_inheritable(store, False)
    previous = sockets.pop(0) if layout.has_previous else None
    return layout, Joints(store, previous, sockets.pop(0) if layout.has_next else None)
