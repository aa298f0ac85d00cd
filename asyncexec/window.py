"""The window: which calls wait, run and are done.  A plain state machine, without I/O, clock or asyncio.

Events go in by the methods of `Window`; each returns the decisions that follow, in the order to carry them out:
`Send` a call to its ranks, `Take` what a rank replied, `Complete` the call when all have, or `Fail` its caller.

The rules:

- Calls reach the ranks in the order of submission.  At most `max_concurrent_batches` calls that take a slot run at
  once; further ones wait, and whatever was submitted after them waits behind them.
- A rank replies in call order.  A reply to one call therefore proves that whatever the rank owed to earlier calls is
  lost, and these calls fail; a reply to a call that is not waiting for it is dropped and counted.
- A call fails with the first error of any of its ranks, at once.  It is *settled* when no reply is owed any more:
  only then is its slot free, for only then are its ranks.
- A deadline fails the caller, not the ranks: the call still completes when its replies come, and is then counted by
  the aggregator as any other.
- Ordered calls (steps) complete in the order of submission: each that was sent exactly once, also one that failed,
  for what its other ranks had to say must not be lost.
"""

import collections
import heapq
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec

from asyncexec.errors import AsyncExecError, CallError, ExecutorBusy, ReplyLost, StepTimeout


class Call(msgspec.Struct, eq=False):
    """One call of a method on some ranks.

    Attributes:
        method: the method's name, for people.
        ranks: where it runs.
        wanted: the ranks that reply with their output, none for a notice; the others reply only with errors,
        acknowledging: but for these, which also say when they are done.
        slot: whether it takes one of the `max_concurrent_batches` slots.
        ordered: whether it completes in order with the other ordered calls.
        timeout: seconds from submission; None is no limit.
        content: the caller's own; the window does not look at it.
        call_id: counted from 1 by the window.
        epoch: which set of ranks it was sent to.
        was_sent: whether it has been; before that it waits, unless it is settled.
        settled: nothing is owed any more, or it will never be sent.
        taken: how many of the wanted outputs are there.
        owing: the ranks whose reply is still to come.
        error: the first error of a rank; later ones are in its `others`.
        answered: whether the caller has been given the result or an error.
    """

    method: str
    ranks: Sequence[int]
    wanted: Sequence[int]
    slot: bool
    ordered: bool
    timeout: float | None
    content: Any = None
    acknowledging: Sequence[int] = ()
    call_id: int = 0
    epoch: int = 0
    was_sent: bool = False
    settled: bool = False
    taken: int = 0
    owing: set[int] = set()
    error: CallError | None = None
    skipped: bool = False
    answered: bool = False

    @property
    def has_outputs(self) -> bool:
        """Whether every wanted output is there, and nothing failed."""
        return self.error is None and self.taken == len(self.wanted)


class Send(msgspec.Struct, frozen=True, eq=False):
    """Send the call to its ranks now."""

    call: Call


class Take(msgspec.Struct, frozen=True, eq=False):
    """Merge what a rank replied into what the others replied; they come in any order."""

    call: Call
    rank: int
    output: Any


class Complete(msgspec.Struct, frozen=True, eq=False):
    """No more replies will come.  Answer the caller unless `call.answered`: then the call failed or came too late."""

    call: Call


class Fail(msgspec.Struct, frozen=True, eq=False):
    """Answer the caller with the error."""

    call: Call
    error: AsyncExecError


Decision: TypeAlias = Send | Take | Complete | Fail


class Counters(msgspec.Struct):
    """Replies that were not delivered.

    Attributes:
        late: for a call that was settled, a rank that owed nothing, or a call that never was.
        wrong_epoch: from a set of ranks that is gone.
        lost: owed, and overtaken by the reply to a later call.
    """

    late: int = 0
    wrong_epoch: int = 0
    lost: int = 0


class Window:
    """The calls in flight of one executor.

    Args:
        world_size: ranks are 0 to world_size - 1.
        max_concurrent_batches: slots.
        max_queued: calls that may wait for a slot.
    """

    def __init__(self, world_size: int, max_concurrent_batches: int, max_queued: int) -> None:
        self.epoch = 1
        self.counters = Counters()
        self._slots = max_concurrent_batches
        self._max_queued = max_queued
        self._last_id = 0
        self._running = 0
        self._waiting_for_slot = 0
        self._open: dict[int, Call] = {}
        self._queue: collections.deque[Call] = collections.deque()
        self._ordered: collections.deque[Call] = collections.deque()
        self._owed: list[collections.deque[int]] = [collections.deque() for _ in range(world_size)]
        self._deadlines: list[tuple[float, int]] = []

    @property
    def in_flight(self) -> int:
        """Calls that were sent and are not done."""
        return len(self._open) - len(self._queue)

    @property
    def queued(self) -> int:
        """Calls that wait to be sent."""
        return len(self._queue)

    @property
    def has_room(self) -> bool:
        """Whether a call that takes a slot would be sent at once."""
        return not self._queue and self._running < self._slots

    @property
    def next_deadline(self) -> float | None:
        """When `expire` should next be called, on the clock that `submit` was given; None is not at all."""
        while self._deadlines and self._deadlines[0][1] not in self._open:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def find(self, call_id: int, epoch: int) -> Call | None:
        """The call of this number that is not done; None where there is none."""
        return self._open.get(call_id) if epoch == self.epoch else None

    def last_sent(self, rank: int) -> Call | None:
        """The latest call that was sent to `rank` and is not done; None where there is none."""
        sent = (call for call in self._open.values() if call.was_sent and not call.settled and rank in call.ranks)
        return max(sent, key=lambda call: call.call_id, default=None)

    def submit(self, call: Call, now: float) -> list[Decision]:
        """Accept a call; `now` is in seconds on any monotonic clock.

        Raises:
            ExecutorBusy: it would have to wait for a slot, and as many as allowed wait already.
        """
        if call.slot and not self.has_room and self._waiting_for_slot >= self._max_queued:
            raise ExecutorBusy(
                f"{self._running} steps run and {self._waiting_for_slot} wait; max_concurrent_batches is {self._slots} "
                f"and max_queued_steps is {self._max_queued}: await executor.slot() before submitting more"
            )
        self._last_id += 1
        call.call_id, call.epoch = self._last_id, self.epoch
        self._open[call.call_id] = call
        self._queue.append(call)
        self._waiting_for_slot += call.slot
        if call.ordered:
            self._ordered.append(call)
        if call.timeout is not None:
            heapq.heappush(self._deadlines, (now + call.timeout, call.call_id))
        return self._pump([])

    def replied(self, rank: int, call_id: int, epoch: int, output: Any) -> list[Decision]:
        """`rank` sent its output."""
        decisions: list[Decision] = []
        call = self._received(rank, call_id, epoch, decisions)
        if call is None or rank not in call.owing or rank not in call.wanted:
            self.counters.late += call is not None
            return decisions
        call.owing.discard(rank)
        call.taken += 1
        decisions.append(Take(call, rank, output))
        return self._after_reply(call, decisions)

    def acknowledged(self, rank: int, call_id: int, epoch: int) -> list[Decision]:
        """`rank` is done with the call; its output was not wanted."""
        decisions: list[Decision] = []
        call = self._received(rank, call_id, epoch, decisions)
        if call is None or rank not in call.owing or rank in call.wanted:
            self.counters.late += call is not None
            return decisions
        call.owing.discard(rank)
        return self._after_reply(call, decisions)

    def skipped(self, rank: int, call_id: int, epoch: int) -> list[Decision]:
        """`rank` could not run the call, because a rank of an earlier pipeline stage failed and says why itself."""
        decisions: list[Decision] = []
        call = self._received(rank, call_id, epoch, decisions)
        if call is None or rank not in call.owing:
            self.counters.late += call is not None
            return decisions
        call.owing.discard(rank)
        call.skipped = True
        return self._after_reply(call, decisions)

    def errored(self, rank: int, call_id: int, epoch: int, error: CallError) -> list[Decision]:
        """`rank` raised `error`, whether or not it owed an output."""
        decisions: list[Decision] = []
        call = self._received(rank, call_id, epoch, decisions)
        if call is None:
            return decisions
        call.owing.discard(rank)
        decisions += self._blame(call, error)
        return self._after_reply(call, decisions)

    def expire(self, now: float) -> list[Decision]:
        """Fail the callers whose deadline is at or before `now`; calls not yet sent never will be."""
        decisions: list[Decision] = []
        while (deadline := self.next_deadline) is not None and deadline <= now:
            call = self._open[heapq.heappop(self._deadlines)[1]]
            if not call.answered:
                decisions.append(self._answer(call, _timeout_error(call)))
            if not call.was_sent:
                self._queue.remove(call)
                self._waiting_for_slot -= call.slot
                self._settle(call, decisions)
            elif not call.settled and not call.owing:
                self._settle(call, decisions)  # it was skipped, and why never became known
        return self._pump(decisions)

    def fail(self, error_for: Callable[[Call], AsyncExecError]) -> list[Decision]:
        """Forget all calls, for their ranks are gone, and begin a new epoch.

        Calls whose outputs are all there complete; every other caller that waits gets its error, and what the ranks
        had replied so far counts as a call that failed.
        """
        decisions: list[Decision] = []
        for call in self._open.values():
            if not (call.settled and call.has_outputs) and not call.answered:
                decisions.append(self._answer(call, error_for(call)))
            if call.was_sent:
                decisions.append(Complete(call))
            call.settled = True
        self.epoch += 1
        self._running = self._waiting_for_slot = 0
        self._open.clear()
        self._queue.clear()
        self._ordered.clear()
        self._deadlines.clear()
        for owed in self._owed:
            owed.clear()
        return decisions

    def resize(self, world_size: int, max_concurrent_batches: int) -> list[Decision]:
        """Serve another number of ranks, with other slots.  What ranks that leave still owe will never come."""
        decisions: list[Decision] = []
        for rank, owed in enumerate(self._owed[world_size:], start=world_size):
            for call_id in owed:
                call = self._open[call_id]
                call.owing.discard(rank)
                decisions = self._after_reply(call, decisions)
        self._slots = max_concurrent_batches
        del self._owed[world_size:]
        self._owed += [collections.deque() for _ in range(world_size - len(self._owed))]
        return decisions

    def _pump(self, decisions: list[Decision]) -> list[Decision]:
        """Send from the head of the queue as long as slots allow; returns the decisions with what follows."""
        while self._queue and not (self._queue[0].slot and self._running >= self._slots):
            call = self._queue.popleft()
            self._waiting_for_slot -= call.slot
            self._running += call.slot
            call.was_sent = True
            for ranks in (call.wanted, call.acknowledging):
                call.owing.update(ranks)
                for rank in ranks:
                    self._owed[rank].append(call.call_id)
            decisions.append(Send(call))
            if not call.owing:  # nobody is to answer it
                self._settle(call, decisions)
        return decisions

    def _received(self, rank: int, call_id: int, epoch: int, decisions: list[Decision]) -> Call | None:
        """Fail what this reply proves lost; returns the call that it is for, None where it comes too late."""
        if epoch != self.epoch:
            self.counters.wrong_epoch += 1
            return None
        call = self._open.get(call_id)
        if call is None or not call.was_sent or call.settled or rank not in call.ranks:
            self.counters.late += 1
            return None
        owed = self._owed[rank]
        while owed and owed[0] < call_id:
            decisions += self._lost(self._open[owed.popleft()], rank)
        if owed and owed[0] == call_id:
            owed.popleft()
        return call

    def _lost(self, call: Call, rank: int) -> list[Decision]:
        self.counters.lost += 1
        call.owing.discard(rank)
        message = f"the reply of rank {rank} was lost: it replied to a later call first"
        lost = ReplyLost(message, method=call.method, call_id=call.call_id, epoch=call.epoch, rank=rank)
        return self._after_reply(call, self._blame(call, lost))

    def _blame(self, call: Call, error: CallError) -> list[Decision]:
        """Note a rank's error; the first one is the caller's, unless the caller has its answer."""
        if call.error is not None:
            call.error.others.append(error)
            return []
        call.error = error
        return [] if call.answered else [self._answer(call, error)]

    def _answer(self, call: Call, error: AsyncExecError) -> Decision:
        call.answered = True
        return Fail(call, error)

    def _after_reply(self, call: Call, decisions: list[Decision]) -> list[Decision]:
        """Settle the call if nothing is owed; a skipped one is owed the error that explains it, until its deadline."""
        if call.owing or (call.skipped and not call.answered):
            return decisions
        self._settle(call, decisions)
        return self._pump(decisions)

    def _settle(self, call: Call, decisions: list[Decision]) -> None:
        """The ranks are done with the call; it completes now, or when the ordered calls before it are settled too."""
        if call.was_sent:
            self._running -= call.slot
        call.settled = True
        ended = [] if call.ordered else [call]
        while self._ordered and self._ordered[0].settled:
            ended.append(self._ordered.popleft())
        for done in ended:
            del self._open[done.call_id]
            if done.was_sent:
                decisions.append(Complete(done))


def _timeout_error(call: Call) -> StepTimeout:
    waiting = sorted(call.owing)
    if waiting:
        reason = f"ranks {waiting} had not answered"
    elif not call.was_sent:
        reason = "it was still waiting to be sent"
    else:
        reason = "its ranks had answered, but those of a call before it had not"
    limit = call.timeout or 0.0
    return StepTimeout(
        f"{call.method} took longer than {limit:g} s: {reason}",
        timeout=limit,
        waiting_for=waiting,
        method=call.method,
        call_id=call.call_id,
        epoch=call.epoch,
    )
