"""A transport with faults built in, by a seeded schedule: frames that go astray, and ranks that die or stop."""

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from asyncexec.config import ExecutorConfig
from asyncexec.errors import ConfigError
from asyncexec.transport import KernelState, RankLoss, Transport, TransportEvents
from asyncexec.wire import Buffer, Frame, FrameKind


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong, each with its probability from 0 to 1.

    Attributes:
        seed: the same faults happen to the same sequence of calls, and of replies of a rank.
        drop: a frame never arrives.
        double: it arrives twice.
        delay: it, and what follows it, arrives up to `delay_limit` seconds later.
        swap: it arrives after the next frame of its rank.
        cut: its body is cut short, so that it cannot be decoded.
        calls: whether the above happens to calls on their way to all ranks too, and not to replies alone.
        kill: with each call sent, a rank of it is killed (SIGKILL).
        stop: with each call sent, a rank of it is stopped (SIGSTOP), and goes on after `stop_for` seconds.
        stop_for: seconds.
        delay_limit: seconds.
        after: calls, and replies of a rank, that arrive whole before faults begin, so that an executor can start.
    """

    seed: int = 0
    drop: float = 0.0
    double: float = 0.0
    delay: float = 0.0
    swap: float = 0.0
    cut: float = 0.0
    calls: bool = False
    kill: float = 0.0
    stop: float = 0.0
    stop_for: float = 0.05
    delay_limit: float = 0.005
    after: int = 4


def with_faults(transport: type[Transport], faults: Faults) -> type[Transport]:
    """A transport class that does what `transport` does, with faults; give it to `create_executor` as `transport`.

    The configuration names the transport all the same, for the sake of its options.  Opening it raises ConfigError
    where ranks are to be killed or stopped and are no processes of their own.
    """

    class Faulty(_FaultyTransport):
        Options = transport.Options

        def __init__(self, config: ExecutorConfig, options: Any, events: TransportEvents) -> None:
            super().__init__(config, options, events)
            self.inner = transport(config, options, self)
            self.begin(faults)

    return Faulty


class _FaultyTransport(Transport):
    """Stands between a transport and its executor."""

    inner: Transport

    def begin(self, faults: Faults) -> None:
        """Set up what happens on the way to and from each rank."""
        self._faults = faults
        self._ends = random.Random(f"{faults.seed} ends")
        self._calls_sent = 0
        self._calls = _Way(faults if faults.calls else Faults(), f"{faults.seed} calls", self._send)
        self._replies: list[_Way] = []
        self._make_ways(self.config.world_size)

    def _make_ways(self, world_size: int) -> None:
        for rank in range(len(self._replies), world_size):
            self._replies.append(_Way(self._faults, f"{self._faults.seed} from {rank}", self._receive))

    async def open(self, config: ExecutorConfig) -> None:
        """Open the transport."""
        await self.inner.open(config)
        self._make_ways(config.world_size)
        if (self._faults.kill or self._faults.stop) and self.inner.kernel_state(0).pid is None:
            self.inner.abort()
            await self.inner.close()
            raise ConfigError("faults.kill and faults.stop need ranks that are processes of their own")

    def refusal(self, frame: Frame, ranks: Sequence[int]) -> str | None:
        """Ask the transport."""
        return self.inner.refusal(frame, ranks)

    def send(self, frame: Frame, ranks: Sequence[int]) -> None:
        """Send a frame, or do to it what the schedule says."""
        if frame.kind is not FrameKind.CALL:
            self.inner.send(frame, ranks)
            return
        self._calls.take(frame, ranks)
        self._calls_sent += 1
        if self._calls_sent > self._faults.after:
            for probability, harm in ((self._faults.kill, self._kill), (self._faults.stop, self._stop)):
                if self._ends.random() < probability:
                    harm(self._ends.choice(ranks))

    def staging(self, nbytes: int) -> memoryview | None:
        """The transport's."""
        return self.inner.staging(nbytes)

    async def inspect(self, rank: int, stacks: bool) -> Buffer:
        """Inspect as the transport does: the side channel has no faults."""
        return await self.inner.inspect(rank, stacks)

    def kernel_state(self, rank: int) -> KernelState:
        """Ask the transport."""
        return self.inner.kernel_state(rank)

    async def close(self, ranks: Sequence[int] | None = None) -> None:
        """Close the transport."""
        await self.inner.close(ranks)

    def abort(self) -> None:
        """Abort the transport."""
        self.inner.abort()

    def rank_lost(self, rank: int, loss: RankLoss) -> None:
        """Pass a loss on as it is."""
        self.events.rank_lost(rank, loss)

    def frame_received(self, rank: int, frame: Frame) -> None:
        """Pass a frame of a rank on, or do to it what the schedule says."""
        if frame.kind in (FrameKind.REPLY, FrameKind.DONE):
            self._replies[rank].take(frame, [rank])
        else:
            self._replies[rank].pass_on(frame, [rank])

    def _send(self, frame: Frame, ranks: Sequence[int]) -> None:
        self.inner.send(frame, ranks)

    def _receive(self, frame: Frame, ranks: Sequence[int]) -> None:
        self.events.frame_received(ranks[0], frame)

    def _kill(self, rank: int) -> None:
        self._signal(rank, signal.SIGKILL)

    def _stop(self, rank: int) -> None:
        self._signal(rank, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(self._faults.stop_for, self._signal, rank, signal.SIGCONT)

    def _signal(self, rank: int, number: signal.Signals) -> None:
        kernel = self.inner.kernel_state(rank)
        if kernel.pid is not None and kernel.state != "dead":
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.kill(kernel.pid, number)


class _Way:
    """Calls to the ranks, all of which a fault concerns alike; or replies of one rank."""

    def __init__(self, faults: Faults, seed: str, deliver: Callable[[Frame, Sequence[int]], None]) -> None:
        self._faults = faults
        self._noise = random.Random(seed)
        self._deliver = deliver
        self._seen = 0
        self._held: tuple[Frame, Sequence[int]] | None = None
        self._last_arrival = 0.0

    def take(self, frame: Frame, ranks: Sequence[int]) -> None:
        """Do to a frame what the schedule says."""
        self._seen += 1
        faults = self._faults
        if self._seen <= faults.after:
            self.pass_on(frame, ranks)
            return
        if self._happens(faults.drop):
            return
        if self._happens(faults.cut):
            frame = msgspec.structs.replace(frame, body=bytes(frame.body)[: len(frame.body) // 2])
        if self._held is None and self._happens(faults.swap):
            self._held = frame, ranks
            return
        self.pass_on(frame, ranks)
        if self._happens(faults.double):
            self.pass_on(msgspec.structs.replace(frame), ranks)
        if self._held is not None:
            held, self._held = self._held, None
            self.pass_on(*held)

    def pass_on(self, frame: Frame, ranks: Sequence[int]) -> None:
        """Deliver now or later, never before what was to arrive earlier."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        late = self._noise.uniform(0, self._faults.delay_limit) if self._happens(self._faults.delay) else 0.0
        arrival = max(self._last_arrival, now + late)
        if arrival <= now:
            self._deliver(frame, ranks)
        else:
            loop.call_at(arrival, self._deliver, frame, ranks)
            arrival += 1e-4  # the clock's grain must not turn two around
        self._last_arrival = arrival

    def _happens(self, probability: float) -> bool:
        return self._noise.random() < probability
