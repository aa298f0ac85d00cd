"""Hops by process groups, their protocol: what is announced is received, whatever happens to single steps.

Gloo and host memory stand for NCCL and GPUs here: two stages of two tensor-parallel ranks, as threads.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from asyncexec.errors import PayloadError
from asyncexec_nccl.devices import OutOfStep
from asyncexec_nccl.gpu_hops import GpuHopReceiver, GpuHopSender
from asyncexec_nccl.peer_copies import meet
from asyncexec_nccl.stream import RankStream
from asyncexec_nccl.ways import ReceivingWay, SendingWay

PARTS = 2


class GlooSender(SendingWay):
    """Counts the elements that were sent."""

    def __init__(self, pair: Any) -> None:
        self.pair = pair
        self.sent = 0

    def send(self, parts: Sequence[torch.Tensor]) -> None:
        for part in parts:
            self.pair.send([as_bytes(part)], 1, 0).wait()
            self.sent += part.numel()


class GlooReceiver(ReceivingWay):
    """Counts the elements that were received."""

    def __init__(self, pair: Any) -> None:
        self.pair = pair
        self.received = 0

    def receive(self, layouts: Sequence[tuple[Any, tuple[int, ...]]]) -> list[torch.Tensor]:
        parts = [torch.full(shape, 77, dtype=dtype) for dtype, shape in layouts]
        for part in parts:
            self.pair.recv([as_bytes(part)], 0, 0).wait()
            self.received += part.numel()
        return parts


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


class Stages:
    """The senders and receivers of both tensor-parallel ranks."""

    def __init__(self, folder: Path) -> None:
        names = [f"pair {part}" for part in range(PARTS)]
        with ThreadPoolExecutor(2 * PARTS) as pool:
            joins = [pool.submit(gloo, rank, folder / name) for name in names for rank in range(2)]
            gathers = [pool.submit(gloo, rank, folder / "gather") for rank in range(PARTS)]
            pairs = [join.result() for join in joins]
            self._gathers = [join.result() for join in gathers]
        self.sending = [GlooSender(pair) for pair in pairs[0::2]]
        self.receiving = [GlooReceiver(pair) for pair in pairs[1::2]]
        self._sockets = [socket.socketpair() for _ in range(PARTS)]
        streams = [(RankStream(ours, 1 << 20), RankStream(theirs, 1 << 20)) for ours, theirs in self._sockets]
        self.senders = [
            GpuHopSender(streams[part][0], 1 << 20, self.sending[part], "cpu", part, PARTS) for part in range(PARTS)
        ]
        self.receivers = [
            GpuHopReceiver(streams[part][1], "cpu", self.receiving[part], self._gathers[part], PARTS)
            for part in range(PARTS)
        ]

    def send(self, call_id: int, tensors: dict[str, Any] | None, *replicated: str) -> list[threading.Thread]:
        """From threads: Gloo's sends may wait for the receiver, which NCCL's do not."""
        return [start(sender.send, call_id, tensors, frozenset(replicated)) for sender in self.senders]

    def receive(self, call_id: int) -> list[Any]:
        with ThreadPoolExecutor(PARTS) as pool:
            return list(pool.map(lambda receiver: receiver.receive(call_id), self.receivers))

    @property
    def sent(self) -> int:
        return sum(way.sent for way in self.sending)

    @property
    def received(self) -> int:
        return sum(way.received for way in self.receiving)

    def close(self) -> None:
        for pair in self._sockets:
            for end in pair:
                end.close()


def start(function: Callable[..., object], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=args)
    thread.start()
    return thread


def gloo(rank: int, path: Path) -> Any:
    store = dist.FileStore(str(path), 2)  # type: ignore[attr-defined]
    group = dist.ProcessGroup(store, rank, 2)
    backend = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[Stages]:
    made = Stages(tmp_path)
    yield made
    made.close()


def test_tensors_of_any_kind_arrive(stages: Stages) -> None:
    tensors: dict[str, Any] = {
        "even": torch.arange(24.0).reshape(4, 6),
        "odd": torch.arange(15).reshape(3, 5),
        "turned": torch.arange(8, dtype=torch.bfloat16).reshape(2, 4).t(),
        "scalar": torch.tensor(2.5),
        "short": torch.arange(12, dtype=torch.int16).reshape(2, 6),
        "complex": torch.tensor(1 + 2j),
        "none": torch.empty(0, 7),
        "array": np.array([1, 2]),
    }
    for call_id in (1, 2, 3):
        threads = stages.send(call_id, tensors, "even", "odd", "turned", "short", "none")
        for received in stages.receive(call_id):
            assert set(received) == set(tensors)
            for name, value in tensors.items():
                assert received[name].shape == value.shape
                assert received[name].dtype == value.dtype
                assert (received[name] == value).all()
        for thread in threads:
            thread.join()


def test_of_what_is_replicated_each_rank_sends_its_part(stages: Stages) -> None:
    threads = stages.send(1, {"same": torch.ones(1000), "own": torch.ones(10)}, "same")
    assert all(received["same"].sum() == 1000 for received in stages.receive(1))
    assert stages.received == 1000 + 2 * 10
    for thread in threads:
        thread.join()


def test_steps_that_were_not_run_leave_nothing_behind(stages: Stages) -> None:
    """The sender skips 2; the receiver does not run 3; the sender does not run 5."""
    threads = []
    for call_id in (1, 2, 3, 4, 6):
        threads += stages.send(call_id, None if call_id == 2 else {"x": torch.full((call_id * 10,), call_id)}, "x")
        for thread in threads[-PARTS:]:
            thread.join(0.2)  # the frames of a connection in their order
    for call_id, expected in ((1, 1), (2, None), (4, 4), (5, None), (6, 6)):
        for received in stages.receive(call_id):
            if expected is None:
                assert received is None
            else:
                assert received["x"].tolist() == [expected] * (10 * expected)
    for thread in threads:
        thread.join()
    assert stages.received == stages.sent == 10 + 30 + 40 + 60


def test_a_receiver_without_memory_ends_its_rank(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way would take the next step's tensors for the ones that were not received."""

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    thread = start(stages.senders[0].send, 1, {"x": torch.ones(3)})
    monkeypatch.setattr(stages.receiving[0], "receive", full)
    with pytest.raises(OutOfStep):
        stages.receivers[0].receive(1)
    monkeypatch.undo()
    assert not issubclass(OutOfStep, Exception)
    stages.receiving[0].receive([(torch.float32, (3,))])  # for the sender's thread to end
    thread.join()


def test_a_sender_that_fails_behind_its_announcement_ends_its_rank(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver would wait for the tensors that were announced."""

    def broken(*args: Any) -> Any:
        raise RuntimeError("no copy")

    monkeypatch.setattr(stages.sending[0], "send", broken)
    with pytest.raises(OutOfStep):
        stages.senders[0].send(1, {"x": torch.ones(3)})


def test_parting_waits_for_the_neighbour_but_not_for_ever(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr(stages.receiving[0], "close", lambda: closed.append("receiver"))
    monkeypatch.setattr(stages.sending[0], "let_go", lambda: closed.append("sender"))
    stages.receivers[0].let_go()
    closing = start(stages.receivers[0].close)
    closing.join(0.2)
    assert closing.is_alive()  # the sender still has the receiver's memory
    stages.senders[0].let_go()
    closing.join(1)
    assert closed == ["sender", "receiver"]
    stages.receivers[1].let_go()
    began = time.monotonic()
    stages.receivers[1].close()
    assert 1 < time.monotonic() - began < 4


def test_what_cannot_be_handed_on_is_not_announced(stages: Stages) -> None:
    with pytest.raises(TypeError, match="'text' is a str"):
        stages.senders[0].send(1, {"x": torch.ones(3), "text": "no"})
    with pytest.raises(PayloadError, match="the intermediate tensors are"):
        stages.senders[0].send(1, {"x": torch.ones(3), "array": np.ones(1 << 18)})
    assert stages.sent == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs: tests/gpu has what goes by copies there")
def test_ranks_that_cannot_reach_each_others_memory_agree_on_that() -> None:
    """A pipeline of three, without GPUs: each learns it of itself or of its neighbour, and nobody is left waiting."""
    sockets = [socket.socketpair() for _ in range(2)]
    joints = [tuple(RankStream(end, 1 << 20) for end in pair) for pair in sockets]
    neighbours = [(None, joints[0][0]), (joints[0][1], joints[1][0]), (joints[1][1], None)]
    with ThreadPoolExecutor(3) as pool:
        meetings = [pool.submit(meet, previous, following, "cuda:0", 1 << 20) for previous, following in neighbours]
        assert [meeting.result(10) for meeting in meetings] == [(None, None)] * 3
    for pair in joints:
        for stream in pair:
            stream.close()
