"""Large arguments on `nccl`: through shared memory, and over the sockets where that has no room."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import workers
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asyncexec import ConfigError, ExecutorClosed, ReconfigureDistributedRequest, WorkerDied, create_executor
from asyncexec.errors import WireError
from asyncexec.wire import Buffers, Frame, FrameKind
from asyncexec_nccl import arguments
from asyncexec_nccl.arena import Arena, Region
from asyncexec_nccl.arguments import ArgumentReceiver, ArgumentSender, Piece, Target
from asyncexec_nccl.buffer_store import BufferStore
from asyncexec_nccl.stream import DriverStream, RankStream

RANKS = 3
MIB = 1 << 20


class ArenaMachine(RuleBasedStateMachine):
    """Ranks copy what they are sent in order, each at a pace of its own; some end."""

    def __init__(self) -> None:
        super().__init__()
        self.owed: dict[int, list[Region]] = {rank: [] for rank in range(RANKS)}
        self.copied = [0] * RANKS

    @initialize(capacity=st.integers(0, 4096))
    def begin(self, capacity: int) -> None:
        self.capacity = capacity
        self.arena = Arena(capacity)

    @rule(nbytes=st.integers(1, 1500), ranks=st.sets(st.integers(0, RANKS - 1)))
    def allocate(self, nbytes: int, ranks: set[int]) -> None:
        self.arena.reclaim(self.copied)
        region = self.arena.allocate(nbytes, ranks)
        if region is None:
            assert nbytes > self.capacity - 63 or self.live()
            return
        assert region.end - region.begin >= nbytes
        assert region.begin >= 0
        assert region.end <= self.capacity
        assert all(region.end <= other.begin or other.end <= region.begin for other in self.live())
        for rank in ranks:
            self.owed[rank].append(region)

    @rule(rank=st.integers(0, RANKS - 1), count=st.integers(1, 5))
    def copy(self, rank: int, count: int) -> None:
        for region in self.owed[rank][:count]:
            assert region.number > self.copied[rank]
            self.copied[rank] = region.number
        del self.owed[rank][:count]

    @rule(rank=st.integers(0, RANKS - 1))
    def end(self, rank: int) -> None:
        """Another rank of the same number follows it, and has copied nothing more."""
        self.arena.forget([rank])
        self.owed[rank].clear()

    @invariant()
    def all_is_reclaimed(self) -> None:
        if hasattr(self, "arena"):
            self.arena.reclaim(self.copied)
            assert {region.number for region in self.arena.in_use} == {region.number for region in self.live()}

    def live(self) -> list[Region]:
        return [region for regions in self.owed.values() for region in regions]


TestArena = ArenaMachine.TestCase


class StoreMachine(RuleBasedStateMachine):
    """Buffers come, are kept for a while by somebody in some way, and go."""

    @initialize(capacity=st.integers(0, 1000))
    def begin(self, capacity: int) -> None:
        self.store = BufferStore(capacity)
        self.held: list[tuple[Any, int]] = []
        self.taken = 0

    @rule(nbytes=st.integers(1, 300), how=st.sampled_from(["view", "part", "array", "tensor", "again"]))
    def take(self, nbytes: int, how: str) -> None:
        memory = self.store.take(nbytes)
        assert len(memory) == nbytes
        self.taken = (self.taken + 1) % 256
        memory[:] = bytes([self.taken]) * nbytes
        ways: dict[str, Callable[[memoryview], Any]] = {
            "view": lambda m: m,
            "part": lambda m: m[nbytes // 2 :],
            "array": lambda m: np.frombuffer(m, dtype=np.uint8)[nbytes // 2 :],
            "tensor": lambda m: torch.frombuffer(m, dtype=torch.uint8)[nbytes // 2 :],
            "again": memoryview,
        }
        self.held.append((ways[how](memory), self.taken))

    @rule(index=st.integers(0, 1000))
    def let_go(self, index: int) -> None:
        if self.held:
            del self.held[index % len(self.held)]

    @invariant()
    def nothing_that_is_held_is_used_again(self) -> None:
        for memory, number in getattr(self, "held", []):
            assert bytes(memoryview(memory) if isinstance(memory, memoryview) else np.asarray(memory)) == bytes(
                [number]
            ) * len(memory)


TestStore = StoreMachine.TestCase


def test_what_nobody_has_any_more_is_used_again() -> None:
    store = BufferStore(1000)
    first = torch.frombuffer(store.take(400), dtype=torch.uint8)
    address = first.data_ptr()
    assert torch.frombuffer(store.take(400), dtype=torch.uint8).data_ptr() != address
    del first
    assert address in [torch.frombuffer(store.take(size), dtype=torch.uint8).data_ptr() for size in (400, 390)]


class Way:
    """A driver's half, and a rank's half for each of some ranks; `raw` frames are those on the sockets."""

    def __init__(self, capacity: int, ranks: int = 2, to_device: bool = False) -> None:
        loop = asyncio.get_running_loop()
        self.sender = ArgumentSender(loop, capacity, to_device)
        pairs = [socket.socketpair() for _ in range(ranks)]
        self.streams = {
            rank: DriverStream(loop, ours, MIB, lambda frame: None, lambda error: None)
            for rank, (ours, _) in enumerate(pairs)
        }
        self.ranks = [RankStream(theirs, 100 * MIB) for _, theirs in pairs]
        self.inherited = [os.dup(self.sender.descriptor) for _ in pairs]
        self.receivers = [
            ArgumentReceiver(descriptor, capacity, rank, 100 * MIB) for rank, descriptor in enumerate(self.inherited)
        ]
        self.beside: list[list[int]] = [[] for _ in range(ranks)]  # sizes of the buffers that came over the socket

    def send(self, frame: Frame, ranks: list[int] | None = None) -> None:
        streams = {rank: self.streams[rank] for rank in (self.streams if ranks is None else ranks)}
        if self.sender.takes(frame):
            self.sender.send(frame, streams, len(streams) == len(self.streams))
        else:
            for stream in streams.values():
                stream.send(frame.pack())

    async def receive(self, rank: int) -> Frame:
        def wait() -> Frame:
            while (frame := self.ranks[rank].receive()) is not None and frame.kind is FrameKind.PIECE:
                self.receivers[rank].take(frame)
            if frame is None:
                raise EOFError
            self.beside[rank] += [len(buffer) for buffer in frame.buffers]
            return self.receivers[rank].complete(frame)

        return await asyncio.to_thread(wait)

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()
        for rank in self.ranks:
            rank.close()
        for descriptor in self.inherited:
            os.close(descriptor)
        self.sender.close()


@pytest.fixture
def way_of() -> Iterator[Callable[..., Way]]:
    ways: list[Way] = []

    def make(*arguments: Any) -> Way:
        ways.append(Way(*arguments))
        return ways[-1]

    yield make
    for way in ways:
        way.close()


def call(number: int, *sizes: int) -> Frame:
    return Frame(FrameKind.CALL, number, body=b"body", buffers=[os.urandom(size) for size in sizes])


def require_same(received: Frame, sent: Frame) -> None:
    assert (received.kind, received.call_id, bytes(received.body)) == (sent.kind, sent.call_id, bytes(sent.body))
    assert [bytes(buffer) for buffer in received.buffers] == list(sent.buffers)


async def test_large_buffers_lie_in_shared_memory_and_small_ones_beside_the_frame(
    way_of: Callable[..., Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "PIECE", 100_000)  # so that most buffers take several turns of the loop
    way = way_of(10 * MIB)
    sent = [call(1, 5000, 350_000, 0, 100_000, 1), call(2), call(3, 200_000), call(4, 2 * MIB, 2 * MIB), call(5, 30)]
    for frame in sent:
        way.send(frame)
    for rank in range(2):
        for frame in sent:
            require_same(await way.receive(rank), frame)
    assert way.beside == [[5000, 0, 1, 30]] * 2


async def test_what_does_not_fit_goes_over_the_sockets(way_of: Callable[..., Way]) -> None:
    way = way_of(2 * MIB)
    sent = [call(number, MIB) for number in range(1, 5)] + [call(5, 3 * MIB, MIB)]
    for frame in sent:
        way.send(frame)  # more than there is room for: it does not wait
    for rank in range(2):
        for frame in sent:
            require_same(await way.receive(rank), frame)
    assert way.beside == [[MIB, MIB, 3 * MIB, MIB]] * 2
    way.send(call(6, MIB))
    await way.receive(0)
    assert way.beside[0] == [MIB, MIB, 3 * MIB, MIB], "the room was not taken back"


async def test_a_rank_that_lags_behind_withholds_its_own_regions_alone(way_of: Callable[..., Way]) -> None:
    way = way_of(3 * MIB)
    way.send(call(1, MIB), [1])
    for number in range(2, 20):
        way.send(call(number, MIB), [0])
        await way.receive(0)
    assert way.beside[0] == []
    way.sender.forget([1])
    way.send(call(20, 3 * MIB), [0])
    await way.receive(0)
    assert way.beside[0] == []


async def test_a_rank_that_is_gone_is_not_waited_for(way_of: Callable[..., Way]) -> None:
    way = way_of(MIB)
    way.streams[1].close()
    for number in range(1, 5):
        sent = call(number, MIB)
        way.send(sent)
        require_same(await way.receive(0), sent)
    assert way.beside[0] == []


@pytest.mark.parametrize("capacity", [0, 3 * MIB // 2, 10 * MIB])
@pytest.mark.parametrize("ranks", [[0, 1], [1]])
async def test_what_is_a_large_tensors_arrives_as_a_tensor(
    way_of: Callable[..., Way], ranks: list[int], capacity: int
) -> None:
    way = way_of(capacity, 2, True)
    sent = call(1, MIB, 70_000, MIB + 4, 5, MIB)
    sent.buffers, memory = Buffers(), sent.buffers
    sent.buffers += memory
    sent.buffers.tensors |= {0, 1, 2, 3}
    start = Frame(FrameKind.START, 2, body=b"body", buffers=sent.buffers)
    way.send(sent, ranks)
    way.send(start, ranks)
    way.send(call(3), ranks)
    for rank in ranks:
        received = await way.receive(rank)
        came: list[Any] = list(received.buffers)
        assert [isinstance(one, torch.Tensor) for one in came] == [True, False, True, False, False]
        received.buffers = [bytes(np.asarray(one)) for one in came]
        require_same(received, sent)
        require_same(await way.receive(rank), start)
        require_same(await way.receive(rank), call(3))


async def test_without_shared_memory_everything_goes_over_the_sockets(way_of: Callable[..., Way]) -> None:
    way = way_of(0)
    way.send(sent := call(1, MIB))
    require_same(await way.receive(1), sent)
    assert os.fstat(way.sender.descriptor).st_blocks == 0


async def test_memory_is_taken_as_it_is_used(way_of: Callable[..., Way]) -> None:
    way = way_of(64 * MIB)
    assert os.fstat(way.sender.descriptor).st_blocks == 0
    for number in range(10):
        way.send(call(number, MIB))
        for rank in range(2):
            await way.receive(rank)
    assert os.fstat(way.sender.descriptor).st_blocks * 512 <= 2 * MIB


@pytest.mark.parametrize(
    ("piece", "refused"),
    [
        (Piece(1, 0, 0, 200 * MIB, 0, 10), "announces 209715200 bytes"),
        (Piece(1, 0, 4 * MIB, 10, 0, 10), "does not fit"),
        (Piece(1, 0, 4 * MIB - 5, 10, 0, 10), "does not fit"),
        (Piece(1, 0, 1 << 63, 10, 0, 10), "does not fit"),
        (Piece(1, 0, 0, 10, 0, 11), "does not fit"),
        (Piece(1, 0, 0, 10, 5, 5), "does not fit"),
        (Piece(1, 0, 0, 10, 1 << 63, 10), "does not fit"),
    ],
)
async def test_a_piece_that_cannot_be_is_refused(way_of: Callable[..., Way], piece: Piece, refused: str) -> None:
    [receiver, _] = way_of(4 * MIB).receivers
    with pytest.raises(WireError, match=refused):
        receiver.take(Frame(FrameKind.PIECE, body=piece.pack()))


async def test_pieces_that_make_no_frame_are_refused(way_of: Callable[..., Way]) -> None:
    halves, far = way_of(4 * MIB).receivers
    halves.take(Frame(FrameKind.PIECE, body=Piece(1, 0, 0, 10, 0, 5).pack()))
    with pytest.raises(WireError, match="not whole"):
        halves.complete(call(1))
    far.take(Frame(FrameKind.PIECE, body=Piece(1, 2, 0, 10, 0, 10).pack()))
    with pytest.raises(WireError, match="too far behind"):
        far.complete(call(1, 5))
    [_, none] = way_of(4 * MIB).receivers
    none.take(Frame(FrameKind.PIECE, body=Piece(0, 1, 0, 0, 0, 0, Target.DEVICE).pack()))
    with pytest.raises(WireError, match="none of place 1"):
        none.complete(call(1, 5))
    with pytest.raises(WireError, match="has 3 bytes"):
        far.take(Frame(FrameKind.PIECE, body=b"abc"))


async def test_memory_that_is_too_small_is_refused() -> None:
    descriptor = os.memfd_create("small")
    try:
        with pytest.raises(WireError, match="there are 0"):
            ArgumentReceiver(descriptor, MIB, 0, MIB).take(
                Frame(FrameKind.PIECE, body=Piece(1, 0, 0, 10, 0, 10).pack())
            )
    finally:
        os.close(descriptor)


def config(ranks: int = 2, shared: int = 8 * MIB, device: str = "cpu", **more: Any) -> dict[str, Any]:
    options = {"backend": "none", "shared_memory_bytes": shared, "input_device": device}
    return {"transport": "nccl", "tensor_parallel_size": ranks, "options": {"nccl": options}, **more}


VALUES: dict[str, Any] = {
    **{
        str(dtype): torch.arange(300_000).to(dtype).reshape(3, -1)
        for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64)
    },
    "transposed": torch.arange(300_000.0).reshape(3, -1).T,
    "array": np.arange(300_000),
    "bytes": os.urandom(300_000),
    "mixed": [np.arange(200_000), torch.arange(200_000), np.arange(200_000), b"small", torch.ones(400_000)],
    "partly": [torch.arange(10), torch.arange(50_000), b"small", np.zeros(0)],
}


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("shared", [0, MIB, 8 * MIB])
@pytest.mark.parametrize("device", ["cpu", "rank"])
async def test_every_rank_gets_every_value(shared: int, device: str) -> None:
    async with create_executor(config(shared=shared, device=device, aggregator="all"), workers.EchoWorker) as executor:
        for name, value in VALUES.items():
            for received in await executor.execute_model(value):
                assert type(received) is type(value), name
                for one, other in zip(*((v if isinstance(v, list) else [v]) for v in (received, value)), strict=True):
                    assert type(one) is type(other), name
                    assert bool((one == other).all()) if hasattr(one, "all") else one == other, name
                    assert getattr(one, "dtype", None) == getattr(other, "dtype", None), name
        arrays = await executor.collective_rpc("add_one", (np.arange(100_000),))
        assert all((array == np.arange(1, 100_001)).all() for array in arrays)


class Keeper:
    """Writes to what it gets, and keeps it."""

    def __init__(self, context: Any) -> None:
        self.rank = context.rank
        self.kept: list[Any] = []

    def execute_model(self, scheduler_output: Any, intermediate: None) -> None:
        scheduler_output += 100 * (self.rank + 1)
        self.kept.append(scheduler_output)

    def values(self) -> list[list[int]]:
        return [kept.unique().tolist() for kept in self.kept]

    def pid(self) -> int:
        return os.getpid()

    def nap(self, seconds: float, tensor: Any = None) -> None:
        time.sleep(seconds)


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("device", ["cpu", "rank"])
async def test_what_a_worker_gets_is_its_own(device: str) -> None:
    async with create_executor(config(device=device), Keeper) as executor:
        for number in range(30):
            await executor.execute_model(torch.full((150_000,), number))
        values = await executor.collective_rpc("values")
    assert values == [[[number + 100 * (rank + 1)] for number in range(30)] for rank in range(2)]


@pytest.mark.usefixtures("no_leftovers")
async def test_calls_of_some_ranks_and_of_all_in_flight_together() -> None:
    async with create_executor(config(ranks=3, shared=2 * MIB), workers.EchoWorker) as executor:
        tensors = [torch.full((30_000 * (n % 4 + 1),), n) for n in range(40)]
        some = [[n % 3, (n + 1) % 3] if n % 2 else None for n in range(40)]
        calls = [
            executor.collective_rpc("untyped", (tensor,), ranks=ranks)
            for tensor, ranks in zip(tensors, some, strict=True)
        ]
        for tensor, ranks, results in zip(tensors, some, await asyncio.gather(*calls), strict=True):
            assert len(results) == (3 if ranks is None else 2)
            assert all(torch.equal(args[0], tensor) for args, _ in results)


def address(worker: Any, array: np.ndarray) -> int:
    return int(array.ctypes.data)


@pytest.mark.usefixtures("no_leftovers")
async def test_memory_that_the_worker_let_go_of_is_received_into_again() -> None:
    async with create_executor(config(), Keeper) as executor:
        addresses = [await executor.collective_rpc(address, (np.zeros(MIB // 8),), ranks=[0]) for _ in range(5)]
    assert len(set(map(tuple, addresses))) == 1


class Typed:
    def __init__(self, context: Any) -> None:
        pass

    def add(self, array: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(array) + tensor


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("device", ["cpu", "rank"])
async def test_hinted_arguments(device: str) -> None:
    async with create_executor(config(device=device), Typed) as executor:
        numbers = np.arange(300_000)
        for ranks in (None, [1]):
            for total in await executor.collective_rpc("add", (numbers, torch.from_numpy(numbers)), ranks=ranks):
                assert torch.equal(total, torch.from_numpy(2 * numbers))


@pytest.mark.usefixtures("no_leftovers")
async def test_a_cancelled_or_late_call_leaves_the_next_unharmed() -> None:
    async with create_executor(config(), Keeper) as executor:
        large = torch.zeros(3 * MIB // 8, dtype=torch.int64)
        late = asyncio.ensure_future(executor.collective_rpc("nap", (0.2, large)))
        await asyncio.sleep(0)
        late.cancel()
        with pytest.raises(TimeoutError):
            await executor.collective_rpc("nap", (0.0, large), timeout=0.05)
        for number in range(5):
            await executor.execute_model(torch.full((200_000,), number))
        assert (await executor.collective_rpc("values"))[1] == [[number + 200] for number in range(5)]


@pytest.mark.usefixtures("no_leftovers")
async def test_a_rank_killed_amid_a_large_call() -> None:
    executor = create_executor(config(), Keeper)
    await executor.start()
    pids = await executor.collective_rpc("pid")
    large = torch.zeros(6 * MIB, dtype=torch.uint8)
    calls = [asyncio.ensure_future(executor.collective_rpc("nap", (60, large))) for _ in range(3)]
    await asyncio.sleep(0)  # the first one's memory is partly copied
    os.kill(pids[1], signal.SIGKILL)
    for one in calls:
        with pytest.raises(WorkerDied, match="rank 1 died"):
            await one
    await executor.aclose()


@pytest.mark.usefixtures("no_leftovers")
async def test_a_stopped_rank_holds_up_its_own_calls_alone() -> None:
    async with create_executor(config(), workers.EchoWorker) as executor:
        pids = await executor.collective_rpc("pid")
        os.kill(pids[1], signal.SIGSTOP)
        large = torch.arange(500_000)
        stuck = [asyncio.ensure_future(executor.collective_rpc("untyped", (large,), ranks=[1])) for _ in range(5)]
        for _ in range(5):  # over the socket: the arena is full of what the other rank has not copied
            [(args, _)] = await executor.collective_rpc("untyped", (large,), ranks=[0])
            assert torch.equal(args[0], large)
        os.kill(pids[1], signal.SIGCONT)
        for results in await asyncio.gather(*stuck):
            assert torch.equal(results[0][0][0], large)


@pytest.mark.usefixtures("no_leftovers")
async def test_large_calls_while_ranks_come_and_go() -> None:
    def sizes(ranks: int) -> ReconfigureDistributedRequest:
        return ReconfigureDistributedRequest(tensor_parallel_size=ranks)

    async with create_executor(config(shared=2 * MIB, aggregator="all"), workers.EchoWorker) as executor:
        for ranks in (3, 1, 4, 2):
            tensors = [torch.full((100_000,), n) for n in range(6)]
            before = [executor.execute_model(tensor) for tensor in tensors]
            await executor.reinitialize_distributed(sizes(ranks))
            after = [executor.execute_model(tensor) for tensor in tensors]
            for tensor, *futures in zip(tensors, before, after, strict=True):
                old, new = await asyncio.gather(*futures)
                assert all(torch.equal(received, tensor) for received in [*old, *new])
            assert len(new) == ranks


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("how", ["aclose", "abort"])
async def test_an_end_while_a_large_argument_is_being_copied(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "PIECE", 10_000)
    executor = create_executor(config(), workers.EchoWorker)
    await executor.start()
    future = executor.execute_model(torch.zeros(MIB, dtype=torch.uint8))
    if how == "aclose":
        await executor.aclose()
        assert (await future).nbytes == MIB
    else:
        executor.abort()
        with pytest.raises(Exception, match="abort"):
            await future
        await executor.aclose()


class Recorder:
    """Leaves a file when it has run."""

    def __init__(self, context: Any, path: str) -> None:
        self.path = f"{path}/{context.rank}"

    def execute_model(self, scheduler_output: Any, intermediate: None) -> None:
        with open(self.path, "w") as file:
            file.write(str(scheduler_output.nbytes))


@pytest.mark.usefixtures("no_leftovers")
async def test_what_was_sent_before_an_end_is_finished_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "PIECE", 10_000)
    settings = config(timeouts={"drain": 1e-6})
    executor = create_executor(settings, Recorder, worker_kwargs={"path": str(tmp_path)})
    await executor.start()
    future = executor.execute_model(torch.zeros(MIB, dtype=torch.uint8))
    await executor.aclose()  # gives the call no time, but asks the ranks to leave behind it
    with contextlib.suppress(ExecutorClosed):
        await future
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [str(MIB)] * 2


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("size", [-1, 1 << 62, 1 << 70])
async def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="shared_memory_bytes"):
        await create_executor(config(shared=size), workers.EchoWorker).start()
