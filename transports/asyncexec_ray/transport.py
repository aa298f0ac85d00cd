"""The driver's half: opens the ranks, sends their frames, ends them."""

import asyncio
import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import anyio

from asyncexec.config import ExecutorConfig
from asyncexec.errors import ConfigError
from asyncexec.transport import KernelState, RankLoss, Transport, TransportEvents
from asyncexec.wire import Buffer, Frame, FrameKind
from asyncexec_ray import graph_internals
from asyncexec_ray.cluster import CLUSTER
from asyncexec_ray.graph import StepGraph, compile_graph
from asyncexec_ray.member import Member, cause_of
from asyncexec_ray.messages import Place, Seat, step_message, step_overhead
from asyncexec_ray.options import RayOptions
from asyncexec_ray.placement import PlacedActor, Placement, local_ranks
from asyncexec_ray.refs import finish

logger = logging.getLogger("asyncexec")

_LAST_LIMIT = 5.0
"""Seconds that Ray and the kernel are given to end an actor after SIGKILL."""

_DEATH_LIMIT = 1.0
"""Seconds between a graph's ending by itself and Ray's telling of the death behind it; more than enough."""


class RayTransport(Transport):
    """One actor per rank in a placement group.

    Steps of all ranks go through a compiled graph; everything else goes by ordinary actor calls beside it.
    """

    Options = RayOptions
    options: RayOptions

    def __init__(self, config: ExecutorConfig, options: Any, events: TransportEvents) -> None:
        super().__init__(config, options, events)
        self._members: list[Member] = []
        self._placement = Placement()
        self._graph: StepGraph | None = None
        self._connected = False
        self._opening: asyncio.Task[None] | None = None
        self._aborted = False
        self._closing = False
        self._closed = False
        self._step_method = 0
        self._one_changed = anyio.Event()

    @classmethod
    def unavailable(cls) -> str | None:
        """Linux and Ray are needed."""
        if sys.platform != "linux":
            return f"it watches its ranks through pidfds, which {sys.platform} does not have; it needs Linux"
        if importlib.util.find_spec("ray") is None:
            return "Ray is not installed: pip install 'asyncexec[ray]'"
        return None

    async def open(self) -> None:
        """Place the actors.  They join each other and construct their workers when they get the START frame."""
        if self.options.driver == "direct":
            graph_internals.require_support()
        self._opening = asyncio.create_task(self._open())
        try:
            await self._opening
        except asyncio.CancelledError:
            if self._closing and self._opening.cancelled():
                return  # by `close`, which cleans up
            self.abort()
            with anyio.CancelScope(shield=True):
                await self.close()
            raise
        except BaseException:
            self.abort()
            with anyio.CancelScope(shield=True):
                await self.close()
            raise

    def refusal(self, frame: Frame, ranks: Sequence[int]) -> str | None:
        """A step must fit into a buffer of the graph's channels, too."""
        if self._is_step(frame, ranks):
            size, limit = frame.size + step_overhead(frame, len(ranks)), self.options.buffer_size_bytes
            if size > limit:
                return f"are {size} bytes; options.ray.buffer_size_bytes is {limit}"
        return super().refusal(frame, ranks)

    def send(self, frame: Frame, ranks: Sequence[int]) -> None:
        """Steps go to the graph, all else to the actors; the numbers keep them in order."""
        if frame.kind is FrameKind.START:
            self._step_method = frame.method
        if self._graph is not None and self._is_step(frame, ranks):
            numbers = [member.next_number() for member in self._members]
            self._graph.send(step_message(numbers, frame))
            return
        for rank in ranks:
            self._members[rank].call(frame)

    async def inspect(self, rank: int) -> Buffer:
        """Ask by a call that has a thread of its own."""
        try:
            return await self._members[rank].inspect()
        except importlib.import_module("ray.exceptions").RayError as error:
            raise ConnectionError(f"the rank is gone: {error}") from error

    def kernel_state(self, rank: int) -> KernelState:
        """From /proc on the driver's host; elsewhere, what Ray has said."""
        return self._members[rank].kernel_state()

    async def close(self) -> None:
        """STOP, then Ray's kill, then SIGKILL where that can be sent, each within its limit."""
        if self._closed:
            return
        self._closing = self._closed = True
        limits = self.config.timeouts
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait([self._opening])
            self._aborted = True
        if not self._aborted:
            self.send(Frame(FrameKind.STOP), range(len(self._members)))
            if await self._within(limits.stop, lambda member: member.left):
                await self._close_graph(limits.terminate)
        self._kill()
        if not await self._within(limits.terminate, lambda member: member.loss is not None):
            for member in self._members:
                member.kill_process()
            await self._within(_LAST_LIMIT, lambda member: member.loss is not None)
        await self._close_graph(_LAST_LIMIT)
        for member in self._members:
            member.close()
        await finish(asyncio.to_thread(self._disconnect))

    def abort(self) -> None:
        """Kill every actor."""
        self._closing = self._aborted = True
        self._kill()

    async def _open(self) -> None:
        await finish(asyncio.to_thread(self._connect))
        placed = await self._placement.fill(self.options, self.config.world_size)
        await self._seat(placed)

    def _connect(self) -> None:
        CLUSTER.acquire(self.options.address)
        self._connected = True

    def _disconnect(self) -> None:
        if self._connected:
            self._connected = False
            self._placement.remove()
            CLUSTER.release()

    async def _seat(self, placed: Sequence[PlacedActor]) -> None:
        """Give the actors their ranks, and make what their steps go through."""
        places = [each.place for each in placed]
        seats = _seats(self.config, self.options, places)
        for rank, (actor, place) in enumerate(placed):
            on_frame = functools.partial(self.events.frame_received, rank)
            on_change = functools.partial(self._changed, rank)
            self._members.append(Member(actor, place, self._placement.driver_node, on_frame, on_change))
        leader = placed[0].actor
        await asyncio.gather(*(member.sit(seat, leader) for member, seat in zip(self._members, seats, strict=True)))
        self._graph = self._make_graph(seats[0], _spans_hosts(places, self._placement.driver_node))

    def _make_graph(self, seat: Seat, spans_hosts: bool) -> StepGraph:
        actors = [member.actor for member in self._members]
        size, output_rank = self.config.tensor_parallel_size, self.config.output_rank
        stages = [actors[first : first + size] for first in range(0, len(actors), size)]
        # the reply that is waited for is read first
        outputs = [output_rank, *(rank for rank in range(len(actors)) if rank != output_rank)]
        capacity = self.config.max_concurrent_batches + 1  # ranks that need not reply may be one behind
        return StepGraph(
            functools.partial(compile_graph, stages, outputs, seat.tensor_transport, self.options, capacity),
            self.options.idle_teardown,
            "documented" if spans_hosts else self.options.driver,
            capacity,
            lambda index, message: self._members[outputs[index]].received(message),
            self._graph_failed,
        )

    def _is_step(self, frame: Frame, ranks: Sequence[int]) -> bool:
        is_call = frame.kind is FrameKind.CALL and self._step_method == frame.method != 0
        return is_call and len(ranks) == self.config.world_size

    def _changed(self, rank: int) -> None:
        """A rank has left, or has ended."""
        self._one_changed.set()
        self._one_changed = anyio.Event()
        loss = self._members[rank].loss
        if loss is not None and not self._closing:
            self.events.rank_lost(rank, loss)

    def _graph_failed(self, error: BaseException) -> None:
        """Usually the death of a rank is behind it, of which Ray is about to tell."""
        asyncio.get_running_loop().call_later(_DEATH_LIMIT, self._give_up, error)

    def _give_up(self, error: BaseException) -> None:
        if not self._closing:
            reason = f"its compiled graph ended: {cause_of(error)}"
            self.events.rank_lost(self.config.output_rank, RankLoss(reason))

    def _kill(self) -> None:
        kill = importlib.import_module("ray").kill
        for actor in self._placement.actors:
            kill(actor)

    async def _within(self, limit: float, holds: Callable[[Member], bool]) -> bool:
        """Wait until something holds for every rank, for at most `limit` seconds; returns whether it does."""
        with anyio.move_on_after(limit):
            while not all(map(holds, self._members)):
                await self._one_changed.wait()
        return all(map(holds, self._members))

    async def _close_graph(self, limit: float) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            with anyio.move_on_after(limit):
                await graph.close()


def _seats(config: ExecutorConfig, options: RayOptions, places: Sequence[Place]) -> list[Seat]:
    """What each rank is told.  Raises ConfigError where NCCL is asked for, and a rank has no GPU."""
    on_gpus = all(place.gpus for place in places)
    for name in ("backend", "tensor_transport"):
        if getattr(options, name) == "nccl" and not on_gpus:
            raise ConfigError(f"options.ray.{name} is 'nccl', and not every rank has a GPU; see num_gpus")
    backend = options.backend if options.backend != "auto" else "nccl" if on_gpus else "gloo"
    tensors = options.tensor_transport if options.tensor_transport != "auto" else "nccl" if on_gpus else "shm"
    return [
        Seat(
            rank=rank,
            local_rank=local_rank,
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
            backend=backend,
            tensor_transport=tensors,
            buffer_size_bytes=options.buffer_size_bytes,
            one_host=len({place.node for place in places}) == 1,
        )
        for rank, local_rank in enumerate(local_ranks(places))
    ]


def _spans_hosts(places: Sequence[Place], driver_node: str) -> bool:
    """Whether a channel of the graph goes from host to host; says what that means."""
    if all(place.node == driver_node for place in places):
        return False
    logger.warning(
        "the ranks are not all on the driver's host: there Ray's channels have one buffer, so that no steps overlap, "
        "and open bugs of Ray may reorder or hang them after hours (ray#58426, ray#59404, ray#63229)"
    )
    return True
