"""What driver and ranks say to each other, as bytes: frames with numbers before them.

Frames of one direction between the driver and a rank take two ways, the graph and ordinary actor calls.  The numbers
bring them back into the order in which they were sent; each rank, and each direction, counts from 1.
"""

import struct
from collections.abc import Sequence

import msgspec

from asyncexec.wire import HEADER_SIZE, Frame, FrameParser

_NUMBER = struct.Struct("<Q")
_UNLIMITED = 1 << 62
"""Whoever sent a frame has checked its size; and it has been received already."""


class Place(msgspec.Struct, frozen=True):
    """Where an actor was placed.

    Attributes:
        node: Ray's id of its node.
        host: the node's address.
        pid: its process, as it sees itself.
        pid_namespace: tells whether others see that number too.
        gpus: the GPUs that Ray gave it, by Ray's ids.
        stderr: the file that its standard error goes to.
    """

    node: str
    host: str
    pid: int
    pid_namespace: str
    gpus: list[str]
    stderr: str


class Seat(msgspec.Struct, frozen=True):
    """What an actor is told of its rank.

    Attributes:
        rank, local_rank, tensor_parallel_size, pipeline_parallel_size: its place.
        backend: "nccl", "gloo" or "none".
        tensor_transport: "nccl" or "shm".
        buffer_size_bytes: of the options.
        one_host: whether all ranks are on one.
    """

    rank: int
    local_rank: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    backend: str
    tensor_transport: str
    buffer_size_bytes: int
    one_host: bool

    @property
    def world_size(self) -> int:
        """tensor_parallel_size * pipeline_parallel_size."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def packed(frame: Frame) -> bytes:
    """A frame in one piece."""
    return b"".join(frame.pack())


def numbered(number: int, frame: Frame) -> bytes:
    """A frame behind its number."""
    return b"".join((_NUMBER.pack(number), *frame.pack()))


def number_and_frame(message: bytes) -> tuple[int, Frame]:
    """The reverse of `numbered`."""
    return _NUMBER.unpack_from(message)[0], frame_of(message[_NUMBER.size :])


def step_message(numbers: Sequence[int], frame: Frame) -> bytes:
    """A frame for all ranks behind its number on each of them."""
    return b"".join((struct.pack(f"<{len(numbers)}Q", *numbers), *frame.pack()))


def step_overhead(frame: Frame, ranks: int) -> int:
    """Bytes that `step_message` adds to the frame's body and buffers."""
    return HEADER_SIZE + ranks * _NUMBER.size + 8 * len(frame.buffers)


def step_of(message: bytes, rank: int, ranks: int) -> tuple[int, Frame]:
    """The number that a step has on `rank`, and its frame."""
    return _NUMBER.unpack_from(message, rank * _NUMBER.size)[0], frame_of(message[ranks * _NUMBER.size :])


def frame_of(data: bytes) -> Frame:
    """The frame that a packed one is."""
    frames: list[Frame] = []
    FrameParser(_UNLIMITED, frames.append).feed(data)
    return frames[0]
