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
from typing import Annotated, Any, Literal

import anyio
import msgspec

from asyncexec.config import ExecutorConfig
from asyncexec.errors import WireError
from asyncexec.transport import KernelState, RankLoss, Transport, TransportEvents
from asyncexec.wire import Buffer, Frame, FrameKind
from asyncexec_nccl.arguments import ArgumentSender
from asyncexec_nccl.devices import check_devices, check_hop_bytes, collective_timeout
from asyncexec_nccl.layout import Joints, Layout, send_layout
from asyncexec_nccl.process import RankLaunch, RankProcess
from asyncexec_nccl.shared_memory import SharedMemory
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
        rank_environments: variables of single ranks, by rank; ranks behind the end of the list have none.  They win.
        devices: the GPU of each rank, by its index among those that CUDA_VISIBLE_DEVICES leaves visible; so several
            executors share a host.  None is 0, 1, 2 and so on.
        shared_memory_bytes: of memory shared with the ranks, for large arguments on their way; what does not fit goes
            over the sockets.  It takes room as it is used.  A rank keeps as much at most of what it received, to use it
            again.  0 shares none.
        input_device: where tensors of 1 MiB and more among the arguments of calls arrive: "cpu", or "rank", the rank's
            own device (`RankContext.device`).
        hop_bytes: of GPU memory that each rank lends to the previous pipeline stage's, for tensors on their way to it.
            Larger tensors go in parts.  0 lends none, and has tensors go by NCCL.
    """

    backend: Literal["auto", "nccl", "gloo", "none"] = "auto"
    environment: dict[str, str] = {}
    rank_environments: list[dict[str, str]] = []
    devices: list[int] | None = None
    shared_memory_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 27
    input_device: Literal["cpu", "rank"] = "cpu"
    hop_bytes: Annotated[int, msgspec.Meta(ge=0)] = 1 << 26


class NcclTransport(Transport):
    """One spawned process per rank, each on socket pairs that nobody else can open."""

    Options = NcclOptions
    options: NcclOptions

    def __init__(self, config: ExecutorConfig, options: Any, events: TransportEvents) -> None:
        super().__init__(config, options, events)
        self._ranks: list[_Rank] = []
        self._staging: SharedMemory | None = None
        self._arguments: ArgumentSender | None = None

    @classmethod
    def unavailable(cls) -> str | None:
        """Linux and torch are needed."""
        if sys.platform != "linux":
            return f"it watches its ranks through pidfds, which {sys.platform} does not have; it needs Linux"
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed: pip install 'asyncexec[nccl]'"
        return None

    async def open(self, config: ExecutorConfig) -> None:
        """Spawn the ranks that are missing, and tell all their places.  They join each other when they get START."""
        check_devices(self.options.devices, config.world_size)
        check_hop_bytes(self.options.hop_bytes)
        self.config = config
        size = config.tensor_parallel_size
        staging = self._staging = self._staging or SharedMemory("asyncexec-staging")
        if self._arguments is None:
            to_device = self.options.input_device == "rank"
            self._arguments = ArgumentSender(asyncio.get_running_loop(), self.options.shared_memory_bytes, to_device)
        shared = staging.descriptor, self._arguments.descriptor
        with contextlib.ExitStack() as stack:
            store = os.memfd_create("asyncexec-store")
            stack.callback(os.close, store)
            hops = [_pair(stack) for _ in range(config.world_size - size)]
            for number in range(config.world_size):
                if number == len(self._ranks):
                    self._ranks.append(_Rank(number, config, self.options, self.events, *shared))
                previous = hops[number - size][1].fileno() if number >= size else None
                following = hops[number][0].fileno() if number < len(hops) else None
                joints = Joints(store, previous, following)
                self._ranks[number].place(Layout.with_joints(size, config.pipeline_parallel_size, joints), joints)

    def send(self, frame: Frame, ranks: Sequence[int]) -> None:
        """Write the frame to each rank's socket, encoded once; what is large beside it into shared memory."""
        if self._arguments is not None and self._arguments.takes(frame):
            # between pipeline stages a broadcast would have the first wait for what the last one still computes
            together = len(ranks) == self.config.world_size == self.config.tensor_parallel_size
            self._arguments.send(frame, {rank: self._ranks[rank].stream for rank in ranks}, together)
            return
        pieces = frame.pack()
        for rank in ranks:
            self._ranks[rank].stream.send(pieces)

    def staging(self, nbytes: int) -> memoryview | None:
        """Shared with the ranks since they were spawned; it takes no room before it is used."""
        return None if self._staging is None else self._staging.memory(nbytes)

    async def inspect(self, rank: int, stacks: bool) -> Buffer:
        """Ask over a socket of its own, which a thread of its own serves."""
        return await self._ranks[rank].side.ask(stacks)

    def kernel_state(self, rank: int) -> KernelState:
        """From /proc."""
        return self._ranks[rank].process.kernel_state()

    async def close(self, ranks: Sequence[int] | None = None) -> None:
        """STOP, then SIGTERM, then SIGKILL, each within its limit."""
        numbers = [rank for rank in (range(len(self._ranks)) if ranks is None else ranks) if rank < len(self._ranks)]
        leaving = [self._ranks[rank] for rank in numbers]
        limits = self.config.timeouts
        for rank in leaving:
            rank.leaving = True
        self.send(Frame(FrameKind.STOP), numbers)
        for limit, then in ((limits.stop, signal.SIGTERM), (limits.terminate, signal.SIGKILL), (_LAST_LIMIT, None)):
            with anyio.move_on_after(limit):
                for rank in leaving:
                    await rank.ended.wait()
            for rank in leaving:
                if then is not None:
                    rank.process.signal(then)
        for rank in leaving:
            rank.close()
        if ranks is not None:
            self._ranks = [rank for rank in self._ranks if rank not in leaving]
        if self._arguments is not None:
            self._arguments.forget(numbers)
        if ranks is None:
            for shared in (self._staging, self._arguments):
                if shared is not None:
                    shared.close()
            self._staging = self._arguments = None

    def abort(self) -> None:
        """SIGKILL to every rank."""
        for rank in self._ranks:
            rank.leaving = True
            rank.process.signal(signal.SIGKILL)


class _Rank:
    """One rank, as the driver has it: its process, and the sockets to it.

    Attributes:
        process: spawned here.
        stream: calls and replies.
        side: inspections.
        leaving: whether it has been asked to end, so that its end is no loss.
        ended: set when its process has ended.
    """

    def __init__(
        self,
        number: int,
        config: ExecutorConfig,
        options: NcclOptions,
        events: TransportEvents,
        staging: int,
        arguments: int,
    ) -> None:
        self._number = number
        self._events = events
        self.leaving = False
        self.ended = anyio.Event()
        self._loop = loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            control, side, layouts = _pair(stack), _pair(stack), _pair(stack, socket.SOCK_SEQPACKET)
            launch = RankLaunch(
                driver_pid=os.getpid(),
                rank=number,
                backend=options.backend,
                devices=options.devices,
                collective_timeout=collective_timeout(config.timeouts),
                max_frame_bytes=config.max_frame_bytes,
                control=control[1].fileno(),
                side=side[1].fileno(),
                staging=staging,
                arguments=arguments,
                shared_memory_bytes=options.shared_memory_bytes,
                hop_bytes=options.hop_bytes,
                layouts=layouts[1].fileno(),
                sys_path=[str(path) for path in sys.path],
            )
            self.process = RankProcess(loop, launch, _environment(config, options, number), self._exited)
            on_frame = functools.partial(events.frame_received, number)
            self.stream = DriverStream(loop, control[0].dup(), config.max_frame_bytes, on_frame, self._stream_ended)
            self.side = _Side(loop, side[0].dup())
            self._layouts = layouts[0].dup()
            self._layouts.setblocking(False)

    def place(self, layout: Layout, joints: Joints) -> None:
        """Tell it its place among the ranks."""
        with contextlib.suppress(ConnectionError):  # it is gone, and its death explains itself
            send_layout(self._layouts, layout, joints)

    def close(self) -> None:
        """Close the sockets."""
        self.stream.close()
        self.side.close()
        self._layouts.close()

    def _exited(self) -> None:
        """Its process ended: take what it sent last, then say so."""
        self.ended.set()
        self.stream.read()
        self._lost(self.process.loss())

    def _stream_ended(self, error: Exception | None) -> None:
        """Its socket ended.  Usually its process ends with it, and has more to tell."""
        if isinstance(error, WireError):
            self._give_up(f"it sent what is no frame: {error}")
        elif not self.leaving:
            self._loop.call_later(_EXIT_LIMIT, self._give_up, "it closed its connection")

    def _give_up(self, reason: str) -> None:
        if self.process.running:
            self._lost(RankLoss(reason, self.process.pid))

    def _lost(self, loss: RankLoss) -> None:
        if not self.leaving:
            self._events.rank_lost(self._number, loss)


class _Side:
    """The driver's end of a rank's side socket: questions, answered in order."""

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
        self._loop = loop
        self._waiting: collections.deque[asyncio.Future[Buffer]] = collections.deque()
        self._stream = DriverStream(loop, connection, _MAX_REPORT_BYTES, self._answered, self._ended)
        self._lost = False

    async def ask(self, stacks: bool) -> Buffer:
        if self._lost:
            raise ConnectionError("the rank is gone")
        answer: asyncio.Future[Buffer] = self._loop.create_future()
        self._waiting.append(answer)
        self._stream.send(Frame(FrameKind.INSPECT, body=b"stacks" if stacks else b"").pack())
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


def _environment(config: ExecutorConfig, options: NcclOptions, rank: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // config.world_size)
    defaults = {"OMP_NUM_THREADS": str(threads)}
    own = options.rank_environments[rank] if rank < len(options.rank_environments) else {}
    return defaults | dict(os.environ) | options.environment | own


def _pair(
    stack: contextlib.ExitStack, kind: socket.SocketKind = socket.SOCK_STREAM
) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, closed in the driver once the ranks have inherited them or been sent them."""
    first, second = socket.socketpair(socket.AF_UNIX, kind)
    stack.callback(first.close)
    stack.callback(second.close)
    return first, second
