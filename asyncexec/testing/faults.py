"""A transport with faults built in, by a seeded schedule."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import msgspec

from asyncexec.config import ExecutorConfig
from asyncexec.transport import KernelState, RankLoss, Transport, TransportEvents
from asyncexec.wire import Buffer, Frame, FrameKind


class Faults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong with the replies of the ranks, each with its probability from 0 to 1.

    Attributes:
        seed: the same faults happen to the same sequence of replies.
        drop: the reply never arrives.
        double: it arrives twice.
        delay: it, and what its rank sends after it, arrives up to `delay_limit` seconds later.
        swap: it arrives after the next reply of its rank.
        cut: its body is cut short, so that it cannot be decoded.
        delay_limit: seconds.
        after: replies that arrive whole before faults begin, so that an executor can start.
    """

    seed: int = 0
    drop: float = 0.0
    double: float = 0.0
    delay: float = 0.0
    swap: float = 0.0
    cut: float = 0.0
    delay_limit: float = 0.005
    after: int = 8


def with_faults(transport: type[Transport], faults: Faults) -> type[Transport]:
    """A transport class that does what `transport` does, with faults; give it to `create_executor`."""

    class Faulty(_FaultyTransport):
        Options = transport.Options

        def __init__(self, config: ExecutorConfig, options: Any, events: TransportEvents) -> None:
            super().__init__(config, options, events)
            self.inner = transport(config, options, self)
            self.faults = faults
            self.noise = random.Random(faults.seed)

    return Faulty


class _FaultyTransport(Transport):
    """Stands between a transport and its executor."""

    inner: Transport
    faults: Faults
    noise: random.Random

    def __init__(self, config: ExecutorConfig, options: Any, events: TransportEvents) -> None:
        super().__init__(config, options, events)
        self._seen = 0
        self._held: dict[int, Frame] = {}
        self._arrival = [0.0] * config.world_size

    async def open(self) -> None:
        """Open the transport."""
        await self.inner.open()

    def send(self, frame: Frame, ranks: Sequence[int]) -> None:
        """Send as the transport does."""
        self.inner.send(frame, ranks)

    async def inspect(self, rank: int) -> Buffer:
        """Inspect as the transport does: the side channel has no faults."""
        return await self.inner.inspect(rank)

    def kernel_state(self, rank: int) -> KernelState:
        """Ask the transport."""
        return self.inner.kernel_state(rank)

    async def close(self) -> None:
        """Close the transport."""
        await self.inner.close()

    def abort(self) -> None:
        """Abort the transport."""
        self.inner.abort()

    def rank_lost(self, rank: int, loss: RankLoss) -> None:
        """Pass a loss on as it is."""
        self.events.rank_lost(rank, loss)

    def frame_received(self, rank: int, frame: Frame) -> None:
        """Pass a reply on, or do to it what the schedule says."""
        self._seen += 1
        if self._seen <= self.faults.after or frame.kind is not FrameKind.REPLY:
            self._pass_on(rank, frame)
            return
        if self._happens(self.faults.drop):
            return
        if self._happens(self.faults.cut):
            frame.body = bytes(frame.body)[: len(frame.body) // 2]
        if rank not in self._held and self._happens(self.faults.swap):
            self._held[rank] = frame
            return
        self._pass_on(rank, frame)
        if self._happens(self.faults.double):
            self._pass_on(rank, frame)
        if rank in self._held:
            self._pass_on(rank, self._held.pop(rank))

    def _pass_on(self, rank: int, frame: Frame) -> None:
        """Deliver now or later, never before what the rank sent earlier."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        late = self.noise.uniform(0, self.faults.delay_limit) if self._happens(self.faults.delay) else 0.0
        self._arrival[rank] = max(self._arrival[rank], now + late)
        if self._arrival[rank] <= now:
            self.events.frame_received(rank, frame)
        else:
            self._arrival[rank] += 1e-4  # the clock's grain must not turn two around
            loop.call_at(self._arrival[rank], self.events.frame_received, rank, frame)

    def _happens(self, probability: float) -> bool:
        return self.noise.random() < probability
