"""The calls in flight of one executor: the window's decisions carried out over the transport, on the event loop."""

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import msgspec

from asyncexec.aggregate import STEP_METHODS, Aggregator
from asyncexec.codec import Codec
from asyncexec.config import ExecutorConfig
from asyncexec.errors import AsyncExecError, CallError, ExecutorClosed, PayloadError, StepTimeout, WorkerError
from asyncexec.future import StepFuture
from asyncexec.observing import CallRecord, Observer
from asyncexec.runtime import RemoteFailure
from asyncexec.submission import Submission
from asyncexec.transport import Transport
from asyncexec.window import Call, Complete, Counters, Decision, Fail, Send, Take, Window
from asyncexec.wire import ALL_RANKS, NO_RANK, Frame, FrameKind

logger = logging.getLogger("asyncexec")

_REPLY = FrameKind.REPLY

_CENSUS = 32
"""Every so many steps, the ranks whose output is not wanted say that they are done: none of them lags further behind,
and one that hangs is noticed by that step's deadline.  The wire carries their acknowledgements in no other step."""

_DEATH_LIMIT = 0.08
"""Seconds between a rank's connections breaking and the kernel telling of its death; more than enough."""


class Calls:
    """Gives calls to the window, sends them, and answers their callers.

    Args:
        config: for the number of ranks, and the limits of what runs and waits.
        codec: decodes the ranks' outputs.
        transport: sends frames.
        on_deadline: called with the future of a call whose deadline has passed and the error, to answer its caller.
    """

    def __init__(
        self,
        config: ExecutorConfig,
        codec: Codec,
        transport: Transport,
        on_deadline: Callable[[StepFuture[Any], StepTimeout], None],
    ) -> None:
        self._window = Window(config.world_size, config.max_concurrent_batches, config.max_queued_steps)
        self._codec = codec
        self._transport = transport
        self._on_deadline = on_deadline
        self._decisions: collections.deque[Decision] = collections.deque()
        self._carrying_out = False
        self._failed: collections.deque[tuple[int, int]] = collections.deque(maxlen=256)
        self._held: dict[int, tuple[Call, WorkerError]] = {}
        self._rank_free: dict[int, int] = collections.defaultdict(int)
        self._changed: anyio.Event | None = None
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._steps = 0
        self.observers: tuple[Observer, ...] | None = None
        self.traces = False

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Work on this loop from now on."""
        self._loop = loop

    @property
    def counters(self) -> Counters:
        """Replies that were not delivered."""
        return self._window.counters

    @property
    def are_done(self) -> bool:
        """Whether no call is in flight or waits."""
        return not self._window.in_flight + self._window.queued

    @property
    def in_flight(self) -> int:
        """Calls that were sent and are not done."""
        return self._window.in_flight

    @property
    def queued(self) -> int:
        """Calls that wait to be sent."""
        return self._window.queued

    @property
    def has_room(self) -> bool:
        """Whether a call that takes a slot would be sent at once."""
        return self._window.has_room

    def __str__(self) -> str:
        return f"{self._window.in_flight} calls in flight, {self._window.queued} queued; {self.counters}"

    def submit(
        self,
        frame: Frame,
        method: str,
        ranks: Sequence[int],
        output_rank: int,
        aggregator: Aggregator,
        timeout: float | None,
        *,
        slot: bool = False,
        ordered: bool = False,
        submitted: int = 0,
    ) -> StepFuture[Any]:
        """Send a call, or have it wait for its turn.

        Args:
            frame: encoded; completed here.
            method: its name, for people.
            ranks: where it runs.
            output_rank: the one of them whose output is the call's own; NO_RANK for a notice, which is done when sent.
            aggregator: merges the outputs.
            timeout: seconds, or None.
            slot: whether it is one of the steps whose number is limited.
            ordered: whether it completes in order with the other ordered calls.
            submitted: when the caller came, in nanoseconds of CLOCK_MONOTONIC.

        Raises:
            PayloadError: the frame is too large.
            ExecutorBusy: as many calls wait for a slot as are allowed.
        """
        if refusal := self._transport.refusal(frame, ranks):
            raise PayloadError(f"the arguments {refusal}", method=method)
        wanted = ranks if aggregator.needs_all_ranks else () if output_rank == NO_RANK else (output_rank,)
        frame.reply_to = ALL_RANKS if aggregator.needs_all_ranks else output_rank
        encoded = time.monotonic_ns()
        future: StepFuture[Any] = StepFuture(self._loop)
        submission = Submission(frame, future, aggregator, ranks, output_rank, submitted or encoded, encoded)
        call = Call(method, ranks, wanted, slot, ordered, timeout, submission)
        if slot and not aggregator.needs_all_ranks and output_rank != NO_RANK:
            self._steps += 1
            if self._steps % _CENSUS == 0:
                frame.acknowledge = True
                call.acknowledging = [rank for rank in ranks if rank != output_rank]
        decisions = self._window.submit(call, self._loop.time())
        future.call_id = frame.call_id = call.call_id
        frame.epoch = call.epoch
        if self.observers is not None:
            self._tell(self.observers, submission, call)
        self._carry_out(decisions)
        if timeout is not None:
            self._arm_timer()
        return future

    def frame_received(self, rank: int, frame: Frame) -> None:
        """A rank's answer."""
        if frame.kind is _REPLY:
            decisions = self._window.replied(rank, frame.call_id, frame.epoch, frame)
        elif frame.kind is FrameKind.ERROR:
            decisions = self._rank_raised(rank, frame)
        elif frame.kind is FrameKind.DONE:
            decisions = self._window.acknowledged(rank, frame.call_id, frame.epoch)
        else:
            decisions = self._window.skipped(rank, frame.call_id, frame.epoch)
        self._carry_out(decisions)

    def last_sent(self, rank: int) -> Call | None:
        """The latest call that was sent to `rank` and is not done; None where there is none."""
        return self._window.last_sent(rank)

    def fail_one(self, rank: int, call: Call, error: CallError) -> None:
        """Fail a call by the fault of one of its ranks."""
        self._carry_out(self._window.errored(rank, call.call_id, call.epoch, error))

    def fail_all(self, error_for: Callable[[Call], AsyncExecError]) -> None:
        """Fail every call: its ranks are gone.  What the outputs are all there of completes."""
        for call, _ in self._held.values():
            call.content.future.set_exception(error_for(call))
        self._held.clear()
        self._carry_out(self._window.fail(error_for))

    def end(self, why: str) -> None:
        """Fail every call with ExecutorClosed, but for those that had failed already; the end."""
        for call_id in list(self._held):
            self._release(call_id)
        self.fail_all(lambda call: ExecutorClosed(f"{why} [{call.method}, call {call.call_id}]"))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def resize(self, world_size: int, max_concurrent_batches: int) -> None:
        """Serve another number of ranks, with another number of slots."""
        self._carry_out(self._window.resize(world_size, max_concurrent_batches))

    def begin_epoch(self) -> None:
        """The set of ranks has changed: what is submitted from now on is not for the old one."""
        self._window.epoch += 1

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that comes true when a call goes forward, or with `look_again`."""
        while not holds():
            if self._changed is None:
                self._changed = anyio.Event()
            await self._changed.wait()

    def look_again(self) -> None:
        """Have those who wait in `until` look again."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def _tell(self, observers: tuple[Observer, ...], submission: Submission, call: Call) -> None:
        """Have observers told of this call from now on."""
        marks = submission.submitted, submission.encoded
        is_step = call.method in STEP_METHODS and call.ordered
        record = CallRecord(call.method, call.ranks, is_step, *marks, observers, call.call_id, call.epoch)
        submission.record, submission.frame.trace = record, self.traces
        submission.future.observe(record)
        for observer in observers:
            observer.call_submitted(record)

    def _rank_raised(self, rank: int, frame: Frame) -> list[Decision]:
        failure = msgspec.msgpack.decode(frame.body, type=RemoteFailure)
        call = self._window.find(frame.call_id, frame.epoch)
        error = WorkerError(
            failure.type,
            failure.message,
            failure.traceback,
            method=call.method if call else self._codec.method_name(frame.method) or "a callable",
            call_id=frame.call_id,
            epoch=frame.epoch,
            rank=rank,
        )
        if call is None and (frame.epoch, frame.call_id) not in self._failed:
            # the call needed the output of other ranks alone, and has completed with it
            logger.warning("rank %d failed in a call that was complete without it: %s", rank, error)
        decisions = self._window.errored(rank, frame.call_id, frame.epoch, error)
        return self._hold(decisions, error) if failure.in_collective else decisions

    def _hold(self, decisions: Sequence[Decision], error: WorkerError) -> list[Decision]:
        """Keep an error in a collective back for a moment; returns the other decisions.

        The death of the peer, which breaks a collective, is the cause to report, and the kernel is about to tell of it.
        """
        rest: list[Decision] = []
        for decision in decisions:
            if isinstance(decision, Fail) and decision.error is error:
                call = decision.call
                self._held[call.call_id] = call, error
                self._failed.append((call.epoch, call.call_id))
                self._loop.call_later(_DEATH_LIMIT, self._release, call.call_id)
            else:
                rest.append(decision)
        return rest

    def _release(self, call_id: int) -> None:
        """Nobody died: an error in a collective is what it seemed to be."""
        call, error = self._held.pop(call_id, (None, None))
        if call is not None and error is not None:
            call.content.future.set_exception(error)

    def _carry_out(self, decisions: Sequence[Decision]) -> None:
        """Carry out decisions in order, also where carrying out one of them brings about more."""
        self._decisions.extend(decisions)
        if self._carrying_out:
            return
        self._carrying_out = True
        try:
            while self._decisions:
                self._carry_out_one(self._decisions.popleft())
        finally:
            self._carrying_out = False
        if self._changed is not None:
            self.look_again()

    def _carry_out_one(self, decision: Decision) -> None:
        call = decision.call
        submission: Submission = call.content
        # not isinstance, which asks the metaclass of msgspec's structs wherever the answer is no
        if type(decision) is Send:
            submission.begin(call)
            self._transport.send(submission.frame, call.ranks)
            submission.send_ended = time.monotonic_ns()
            if submission.record is not None:
                submission.record.send_ended = submission.send_ended
        elif type(decision) is Take:
            rank, reply = decision.rank, decision.output
            submission.take(call, rank, reply, self._rank_free[rank], self._codec)
            self._rank_free[rank] = reply.ended_ns
        elif type(decision) is Complete:
            submission.complete(call)
        elif type(decision) is Fail:
            self._failed.append((call.epoch, call.call_id))
            if isinstance(decision.error, StepTimeout):
                self._on_deadline(submission.future, decision.error)
            else:
                submission.future.set_exception(decision.error)

    def _arm_timer(self) -> None:
        """Have `_expire` called at the next deadline; a timer that is too early arms itself again."""
        deadline = self._window.next_deadline
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._timer_at = self._loop.call_at(deadline, self._expire), deadline

    def _expire(self) -> None:
        self._timer = None
        self._carry_out(self._window.expire(self._loop.time()))
        self._arm_timer()
