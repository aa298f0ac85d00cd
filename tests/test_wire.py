"""Frames survive any cutting of the stream; a stream that is not ours is refused before memory is allocated."""

import random
import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncexec.errors import WireError
from asyncexec.wire import HEADER_SIZE, Frame, FrameKind, FrameParser

LIMIT = 1 << 22


def stream(frames: list[Frame]) -> bytes:
    return b"".join(bytes(piece) for frame in frames for piece in frame.pack())


def parse(data: bytes, cuts: list[int]) -> list[Frame]:
    """The frames of `data`, given to a parser at most cuts[i % n] bytes at a time."""
    frames: list[Frame] = []
    feed(FrameParser(LIMIT, frames.append), data, cuts)
    return frames


def feed(parser: FrameParser, data: bytes, cuts: list[int]) -> None:
    at, turn = 0, 0
    while at < len(data):
        piece = data[at : at + cuts[turn % len(cuts)]]
        if parser.wanted is None:
            parser.feed(piece)
        else:
            piece = piece[: len(parser.wanted)]
            parser.wanted[: len(piece)] = piece
            parser.received(len(piece))
        at, turn = at + len(piece), turn + 1


def plain(frame: Frame) -> tuple[object, ...]:
    fields = (frame.kind, frame.call_id, frame.epoch, frame.method, frame.reply_to, frame.started_ns, frame.ended_ns)
    return (*fields, bytes(frame.body), [bytes(b) for b in frame.buffers])


# what a frame is drawn from: sizes of its body and buffers, so that a failing example prints small
sizes = st.one_of(st.integers(0, 200), st.integers(0, 300_000))
numbers = {
    "kind": st.sampled_from(FrameKind),
    "call_id": st.integers(0, 2**64 - 1),
    "epoch": st.integers(0, 2**32 - 1),
    "method": st.integers(0, 2**16 - 1),
    "reply_to": st.integers(-1, 2**31 - 1),
    "started_ns": st.integers(0, 2**64 - 1),
    "ended_ns": st.integers(0, 2**64 - 1),
}
frames = st.tuples(st.fixed_dictionaries(numbers), sizes, st.lists(sizes, max_size=4))


@settings(max_examples=50)
@given(st.lists(frames, max_size=4), st.lists(st.integers(1, 100_000), min_size=1, max_size=5))
def test_frames_survive_any_cutting(drawn: list[tuple[dict[str, Any], int, list[int]]], cuts: list[int]) -> None:
    noise = random.Random(1)
    sent = [Frame(**n, body=noise.randbytes(body), buffers=[noise.randbytes(b) for b in bs]) for n, body, bs in drawn]
    received: list[Frame] = []
    parser = FrameParser(LIMIT, received.append)
    feed(parser, stream(sent), cuts)
    assert [plain(f) for f in received] == [plain(f) for f in sent]
    assert not parser.mid_frame


def test_byte_by_byte() -> None:
    sent = [Frame(FrameKind.CALL, 1, body=b"abc", buffers=[b"", b"12"]), Frame(FrameKind.STOP)]
    assert [plain(f) for f in parse(stream(sent), [1])] == [plain(f) for f in sent]


def test_frames_before_a_bad_one_are_given_out() -> None:
    frames: list[Frame] = []
    with pytest.raises(WireError, match="not a frame"):
        feed(FrameParser(LIMIT, frames.append), stream([Frame(FrameKind.CALL, 1)] * 2) + b"nonsense" * 8, [10_000])
    assert len(frames) == 2


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"GET ", "not a frame"),
        (2, b"\x63", "version 99; this side speaks version 2"),
        (3, b"\xc8", "unknown frame kind 200"),
        (8, struct.pack("<I", LIMIT + 1), "max_frame_bytes"),
        (12, struct.pack("<I", 2**32 - 1), "buffers"),
        (12, struct.pack("<I", 1 << 16), None),
    ],
)
def test_a_stream_that_is_not_ours_is_refused(offset: int, value: bytes, message: str | None) -> None:
    data = bytearray(stream([Frame(FrameKind.CALL)]))
    data[offset : offset + len(value)] = value
    parser = FrameParser(LIMIT, lambda frame: pytest.fail("it was given out"))
    if message is None:
        feed(parser, bytes(data), [HEADER_SIZE])
        assert parser.mid_frame
        return
    with pytest.raises(WireError, match=message):
        feed(parser, bytes(data), [HEADER_SIZE])


def test_announced_buffers_are_bounded_before_they_are_allocated() -> None:
    frame = Frame(FrameKind.CALL, buffers=[b"x"])
    head = bytearray(frame.pack()[0])
    head[HEADER_SIZE:] = struct.pack("<Q", 1 << 60)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="max_frame_bytes"):
            parse(bytes(head), [1000])
        assert tracemalloc.get_traced_memory()[1] < 2 * LIMIT
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=400), st.integers(0, 200))
def test_mutated_streams_raise_nothing_else(noise: bytes, position: int) -> None:
    data = bytearray(stream([Frame(FrameKind.REPLY, 7, body=b"body", buffers=[b"buffer" * 9]), Frame(FrameKind.STOP)]))
    data[position : position + len(noise)] = noise
    try:
        parse(bytes(data), [97])
    except WireError:
        return


def test_a_parser_keeps_nothing_of_a_large_frame() -> None:
    frames: list[Frame] = []
    parser = FrameParser(1 << 30, frames.append)
    large = Frame(FrameKind.CALL, buffers=[bytes(1 << 25)])
    tracemalloc.start()
    try:
        for piece in large.pack():
            data = memoryview(piece)
            parser.feed(bytes(data[:1000]))
            if parser.wanted is not None:
                parser.wanted[:] = data[1000:]
                parser.received(len(data) - 1000)
        assert len(frames.pop().buffers[0]) == 1 << 25
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
