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
        self._placements: list[Placement] = []
        self._graph: StepGraph | None = None
        self._connected = False
        self._opening: asyncio.Task[None] | None = None
        self._aborted = False
        self._closing = False
        self._end_of_all: asyncio.Task[None] | None = None
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

    async def open(self, config: ExecutorConfig) -> None:
        """Place the actors that are missing, and give all their seats.  They join each other when they get START."""
        if self.options.driver == "calls" and config.pipeline_parallel_size > 1:
            raise ConfigError(
                f"options.ray.driver is 'calls' and pipeline_parallel_size is {config.pipeline_parallel_size}; only "
                "the graph hands tensors on"
            )
        self.config = config
        is_first = not self._connected
        if is_first and self.options.driver == "direct":
            graph_internals.require_support()
        self._opening = asyncio.create_task(self._open(config))
        try:
            await self._opening
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and self._closing and self._opening.cancelled():
                return  # by `close`, which cleans up
            if is_first:
                self.abort()
                await self.close()
            raise

    def refusal(self, frame: Frame, ranks: Sequence[int]) -> str | None:
        """A step must fit into a buffer of the graph's channels, too."""
        if self._graph is not None and self._is_step(frame, ranks):
            size, limit = frame.size + step_overhead(frame, len(ranks)), self.options.buffer_size_bytes
            if size > limit:
                return f"are {size} bytes; options.ray.buffer_size_bytes is {limit}"
        return super().refusal(frame, ranks)

    def send(self, frame: Frame, ranks: Sequence[int]) -> None:
        """Steps go to the graph, all else to the actors; the numbers keep them in order."""
        if frame.kind is FrameKind.START:
            self._step_method = frame.method
        if self._graph is not None and self._is_step(frame, ranks):
            numbers = [self._members[rank].next_number() for rank in ranks]
            self._graph.send(step_message(numbers, frame))
            return
        for rank in ranks:
            self._members[rank].call(frame)

    async def inspect(self, rank: int, stacks: bool) -> Buffer:
        """Ask by a call that has a thread of its own."""
        try:
            return await self._members[rank].inspect(stacks)
        except importlib.import_module("ray.exceptions").RayError as error:
            raise ConnectionError(f"the rank is gone: {error}") from error

    def kernel_state(self, rank: int) -> KernelState:
        """From /proc on the driver's host; elsewhere, what Ray has said."""
        return self._members[rank].kernel_state()

    async def close(self, ranks: Sequence[int] | None = None) -> None:
        """STOP, then Ray's kill, then SIGKILL where that can be sent, each within its limit."""
        if ranks is not None:
            leaving = [self._members[rank] for rank in ranks if rank < len(self._members)]
            await self._end(leaving)
            self._members = [member for member in self._members if member not in leaving]
            await finish(asyncio.to_thread(self._remove_unused))
        else:
            self._closing = True
            if self._end_of_all is None:
                self._end_of_all = asyncio.create_task(self._close_all())
            await finish(self._end_of_all)

    async def _close_all(self) -> None:
        """A task of its own: who awaits it may be cancelled, any number of times."""
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
            await asyncio.wait([self._opening])
            self._aborted = True
        try:
            await self._end(self._members)
            await self._close_graph(_LAST_LIMIT)
        finally:
            await finish(asyncio.to_thread(self._disconnect))

    def abort(self) -> None:
        """Kill every actor."""
        self._closing = self._aborted = True
        for actor in self._actors():
            importlib.import_module("ray").kill(actor)

    async def _open(self, config: ExecutorConfig) -> None:
        """What `open` does: a task of its own, so that `close` can end it."""
        if not self._connected:
            await finish(asyncio.to_thread(self._connect))
        await self._place(config)

    def _connect(self) -> None:
        CLUSTER.acquire(self.options.address)
        self._connected = True

    def _disconnect(self) -> None:
        if self._connected:
            self._connected = False
            for placement in self._placements:
                placement.remove()
            CLUSTER.release()

    def _remove_unused(self) -> None:
        """Give back what only ranks that have left were placed in."""
        there = {id(member.actor) for member in self._members}
        for placement in list(self._placements):
            if not any(id(actor) in there for actor in placement.actors):
                placement.remove()
                self._placements.remove(placement)

    async def _place(self, config: ExecutorConfig) -> None:
        """Bring up the missing actors, tell all of the layout their seats, and make what their steps go through."""
        missing = config.world_size - len(self._members)
        if missing > 0:
            self._placements.append(placement := Placement())
            self._add(await placement.fill(self.options, missing, first_bundle=len(self._members)), placement)
        await self._close_graph(config.timeouts.stop)
        members = self._members[: config.world_size]
        places = [member.place for member in members]
        seats = _seats(config, self.options, places)
        leader = members[0].actor
        await asyncio.gather(*(member.sit(seat, leader) for member, seat in zip(members, seats, strict=True)))
        if self.options.driver != "calls":
            spans_hosts = _spans_hosts(places, self._placements[0].driver_node)
            self._graph = self._make_graph(members, seats[0], spans_hosts)

    def _add(self, placed: Sequence[PlacedActor], placement: Placement) -> None:
        """Give actors the next ranks."""
        for rank, (actor, place) in enumerate(placed, start=len(self._members)):
            on_frame = functools.partial(self.events.frame_received, rank)
            on_change = functools.partial(self._changed, rank)
            self._members.append(Member(actor, place, placement.driver_node, on_frame, on_change))

    def _make_graph(self, members: Sequence[Member], seat: Seat, spans_hosts: bool) -> StepGraph:
        actors = [member.actor for member in members]
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
            lambda index, message: members[outputs[index]].received(message),
            self._graph_failed,
        )

    def _is_step(self, frame: Frame, ranks: Sequence[int]) -> bool:
        is_call = frame.kind is FrameKind.CALL and self._step_method == frame.method != 0
        return is_call and len(ranks) == self.config.world_size

    def _changed(self, rank: int, member: Member) -> None:
        """A rank has left, or has ended."""
        self._one_changed.set()
        self._one_changed = anyio.Event()
        if member.loss is not None and not (self._closing or member.leaving):
            self.events.rank_lost(rank, member.loss)

    def _graph_failed(self, error: BaseException) -> None:
        """Usually the death of a rank is behind it, of which Ray is about to tell."""
        asyncio.get_running_loop().call_later(_DEATH_LIMIT, self._give_up, error)

    def _give_up(self, error: BaseException) -> None:
        if not self._closing:
            reason = f"its compiled graph ended: {cause_of(error)}"
            self.events.rank_lost(self.config.output_rank, RankLoss(reason))

    def _actors(self) -> list[Any]:
        """All that were created, also those that never got a rank."""
        return [actor for placement in self._placements for actor in placement.actors]

    async def _end(self, members: Sequence[Member]) -> None:
        """End ranks: ask, kill by Ray's means, kill by the kernel's."""
        limits = self.config.timeouts
        for member in members:
            member.leaving = True
        if not self._aborted:
            for member in members:
                member.call(Frame(FrameKind.STOP))
            if await self._within(limits.stop, members, lambda member: member.left) and self._closing:
                await self._close_graph(limits.terminate)
        kill = importlib.import_module("ray").kill
        for actor in self._actors() if self._closing else [member.actor for member in members]:
            kill(actor)
        if not await self._within(limits.terminate, members, lambda member: member.loss is not None):
            for member in members:
                member.kill_process()
            await self._within(_LAST_LIMIT, members, lambda member: member.loss is not None)
        for member in members:
            member.close()

    async def _within(self, limit: float, members: Sequence[Member], holds: Callable[[Member], bool]) -> bool:
        """Wait until something holds for these ranks, for at most `limit` seconds; returns whether it does."""
        with anyio.move_on_after(limit):
            while not all(map(holds, members)):
                await self._one_changed.wait()
        return all(map(holds, members))

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
