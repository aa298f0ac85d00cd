"""The driver's half: spawns the ranks, sends and receives their frames, ends them."""

import asyncio
import collections
import contextlib
import functools
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any, Literal

import anyio
import msgspec

from asyncexec.config import ExecutorConfig
from asyncexec.errors import WireError
from asyncexec.transport import KernelState, RankLoss, Transport, TransportEvents
from asyncexec.wire import Buffer, Frame, FrameKind
from asyncexec_nccl.devices import check_devices, collective_timeout
from asyncexec_nccl.process import RankLaunch, RankProcess
from asyncexec_nccl.staging import StagingArea
from asyncexec_nccl.stream import DriverStream

_EXIT_LIMIT = 1.0
"""Seconds that a process is given to end after its connection did, before the connection is what is reported."""

_MAX_REPORT_BYTES = 1 << 24
"""A rank with thousands of threads still fits."""

_LAST_LIMIT = 5.0
"""Seconds that the kernel is given to end a process after SIGKILL."""


class NcclOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The table `options.nccl`.

    Attributes:
        backend: of the process groups.  "auto" is "nccl" where every rank has a GPU of its own, else "gloo"; "none"
            makes no groups, for workers that make their own.
        environment: variables set for the ranks, beside what they inherit.
        devices: the GPU of each rank, by its index among those that CUDA_VISIBLE_DEVICES leaves visible; so several
            executors share a host.  None is 0, 1, 2 and so on.
    """

    backend: Literal["auto", "nccl", "gloo", "none"] = "auto"
    environment: dict[str, str] = {}
    devices: list[int] | None = None


class NcclTransport(Transport):
    """One spawned process per rank, each on a socket pair that nobody else can open."""

    Options = NcclOptions
    options: NcclOptions

    def __init__(self, config: ExecutorConfig, options: Any, events: TransportEvents) -> None:
        super().__init__(config, options, events)
        check_devices(options.devices, config.world_size)
        self._streams: list[DriverStream] = []
        self._sides: list[_Side] = []
        self._processes: list[RankProcess] = []
        self._closing = False
        self._one_ended = anyio.Event()
        self._staging_fd = -1
        self._staging: StagingArea | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        """Linux and torch are needed."""
        if sys.platform != "linux":
            return f"it watches its ranks through pidfds, which {sys.platform} does not have; it needs Linux"
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed: pip install 'asyncexec[nccl]'"
        return None

    async def open(self) -> None:
        """Spawn the ranks.  They join each other and construct their workers when they get the START frame."""
        loop = asyncio.get_running_loop()
        config, size = self.config, self.config.tensor_parallel_size
        environment = self._environment()
        with contextlib.ExitStack() as stack:
            self._staging_fd = os.memfd_create("asyncexec-staging")
            store = os.memfd_create("asyncexec-store")
            stack.callback(os.close, store)
            hops = [_pair(stack) for _ in range(config.world_size - size)]
            for rank in range(config.world_size):
                control, side = _pair(stack), _pair(stack)
                launch = RankLaunch(
                    driver_pid=os.getpid(),
                    rank=rank,
                    tensor_parallel_size=size,
                    pipeline_parallel_size=config.pipeline_parallel_size,
                    backend=self.options.backend,
                    devices=self.options.devices,
                    collective_timeout=collective_timeout(config.timeouts),
                    max_frame_bytes=config.max_frame_bytes,
                    control=control[1].fileno(),
                    side=side[1].fileno(),
                    store=store,
                    staging=self._staging_fd,
                    previous=hops[rank - size][1].fileno() if rank >= size else -1,
                    next=hops[rank][0].fileno() if rank < len(hops) else -1,
                    sys_path=[str(path) for path in sys.path],
                )
                on_exit = functools.partial(self._exited, rank)
                self._processes.append(RankProcess(loop, launch, environment, on_exit))
                on_frame = functools.partial(self.events.frame_received, rank)
                on_end = functools.partial(self._stream_ended, rank)
                limit = config.max_frame_bytes
                self._streams.append(DriverStream(loop, control[0].dup(), limit, on_frame, on_end))
                self._sides.append(_Side(loop, side[0].dup()))

    def send(self, frame: Frame, ranks: Sequence[int]) -> None:
        """Write the frame to each rank's socket, encoded once."""
        pieces = frame.pack()
        for rank in ranks:
            self._streams[rank].send(pieces)

    def staging(self, nbytes: int) -> memoryview | None:
        """Shared with the ranks since they were spawned; it takes no room before it is used."""
        if self._staging is None:
            self._staging = StagingArea(self._staging_fd)
        return self._staging.memory(nbytes)

    async def inspect(self, rank: int) -> Buffer:
        """Ask over a socket of its own, which a thread of its own serves."""
        return await self._sides[rank].ask()

    def kernel_state(self, rank: int) -> KernelState:
        """From /proc."""
        return self._processes[rank].kernel_state()

    async def close(self) -> None:
        """STOP, then SIGTERM, then SIGKILL, each within its limit."""
        self._closing = True
        limits = self.config.timeouts
        self.send(Frame(FrameKind.STOP), range(len(self._streams)))
        for limit, then in ((limits.stop, signal.SIGTERM), (limits.terminate, signal.SIGKILL), (_LAST_LIMIT, None)):
            with anyio.move_on_after(limit):
                await self._until_all_ended()
            for process in self._processes:
                if then is not None:
                    process.signal(then)
        for stream in self._streams:
            stream.close()
        for side in self._sides:
            side.close()
        self._staging = None
        if self._staging_fd >= 0:
            os.close(self._staging_fd)
            self._staging_fd = -1

    def abort(self) -> None:
        """SIGKILL to every rank."""
        self._closing = True
        for process in self._processes:
            process.signal(signal.SIGKILL)

    async def _until_all_ended(self) -> None:
        while any(process.running for process in self._processes):
            await self._one_ended.wait()

    def _environment(self) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self.config.world_size)
        defaults = {"OMP_NUM_THREADS": str(threads)}
        return defaults | dict(os.environ) | self.options.environment

    def _exited(self, rank: int) -> None:
        """A rank's process ended: take what it sent last, then say so."""
        self._one_ended.set()
        self._one_ended = anyio.Event()
        if rank < len(self._streams):
            self._streams[rank].read()
        self._lost(rank, self._processes[rank].loss())

    def _stream_ended(self, rank: int, error: Exception | None) -> None:
        """A rank's socket ended.  Usually its process ends with it, and has more to tell."""
        if isinstance(error, WireError):
            self._give_up(rank, f"it sent what is no frame: {error}")
        elif not self._closing:
            asyncio.get_running_loop().call_later(_EXIT_LIMIT, self._give_up, rank, "it closed its connection")

    def _give_up(self, rank: int, reason: str) -> None:
        if self._processes[rank].running:
            self._lost(rank, RankLoss(reason, self._processes[rank].pid))

    def _lost(self, rank: int, loss: RankLoss) -> None:
        if not self._closing:
            self.events.rank_lost(rank, loss)


class _Side:
    """The driver's end of a rank's side socket: questions, answered in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
        self._loop = loop
        self._waiting: collections.deque[asyncio.Future[Buffer]] = collections.deque()
        self._stream = DriverStream(loop, connection, _MAX_REPORT_BYTES, self._answered, self._ended)
        self._lost = False

    async def ask(self) -> Buffer:
        if self._lost:
            raise ConnectionError("the rank is gone")
        answer: asyncio.Future[Buffer] = self._loop.create_future()
        self._waiting.append(answer)
        self._stream.send(Frame(FrameKind.INSPECT).pack())
        return await answer

    def close(self) -> None:
        self._stream.close()
        self._ended(None)

    def _answered(self, frame: Frame) -> None:
        answer = self._waiting.popleft()
        if not answer.done():  # who asked may have given up
            answer.set_result(frame.body)

    def _ended(self, error: Exception | None) -> None:
        self._lost = True
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(ConnectionError(f"the rank is gone: {error or 'end of stream'}"))
        self._waiting.clear()


def _pair(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, closed in the driver once the ranks have inherited them."""
    first, second = socket.socketpair()
    stack.callback(first.close)
    stack.callback(second.close)
    return first, second
