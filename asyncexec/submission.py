"""One submitted call: its frame and future, when what happened to it, and how its outputs become the answer."""

import functools
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from asyncexec.aggregate import Aggregator
from asyncexec.codec import Codec
from asyncexec.errors import AggregationError, CallError, PayloadError
from asyncexec.future import StepFuture, StepTiming
from asyncexec.observing import CallRecord, RankReply
from asyncexec.window import Call
from asyncexec.wire import Frame


class Submission(msgspec.Struct, eq=False):
    """What the driver keeps with a call while the window has it.

    Attributes:
        frame: the encoded call.
        future: what the caller holds.
        aggregator: merges the outputs.
        ranks: where the call runs.
        output_rank: the one whose output is the call's own.
        submitted, encoded, send_began, send_ended: when, in nanoseconds of CLOCK_MONOTONIC.
        partial: the aggregator's own, what has been merged so far.
        output: of `output_rank`, once it is there.
        error: the first error of decoding or merging.
        last: the reply that came last,
        received: when the driver had read it, and
        rank_free: when its rank had ended the call before, both in nanoseconds of CLOCK_MONOTONIC.
        record: for observers, if there are any.
    """

    frame: Frame
    future: StepFuture[Any]
    aggregator: Aggregator
    ranks: Sequence[int]
    output_rank: int
    submitted: int
    encoded: int
    send_began: int = 0
    send_ended: int = 0
    partial: Any = None
    output: Any = None
    error: CallError | None = None
    last: Frame | None = None
    received: int = 0
    rank_free: int = 0
    record: CallRecord | None = None

    def begin(self, call: Call) -> None:
        """The call is about to be sent."""
        self.send_began = time.monotonic_ns()
        if self.record is not None:
            self.record.sent = self.send_began
        try:
            self.partial = self.aggregator.begin(self.ranks)
        except Exception as cause:  # noqa: BLE001 - an aggregator may be anybody's code, and raise anything
            self.error = _error(AggregationError, "the aggregator raised", call, cause)

    def take(self, call: Call, rank: int, reply: Frame, rank_free: int, codec: Codec) -> None:
        """Decode a rank's output, and merge it with those that are there."""
        self.last, self.received, self.rank_free = reply, time.monotonic_ns(), rank_free
        if self.record is not None:
            self.record.replies.append(RankReply(rank, reply.started_ns, reply.ended_ns, self.received))
        try:
            output = codec.decode_result(reply)
        except Exception as cause:  # noqa: BLE001 - decoding runs code of the worker's author, which may raise anything
            self.error = self.error or _error(PayloadError, "the result cannot be decoded", call, cause)
            return
        if rank == self.output_rank:
            self.output = output
        try:
            self.aggregator.add(self.partial, rank, output)
        except Exception as cause:  # noqa: BLE001 - as above
            self.error = self.error or _error(AggregationError, "the aggregator raised", call, cause)

    def complete(self, call: Call) -> None:
        """Have the aggregator finish, and answer the caller unless it has been answered already."""
        decoded = time.monotonic_ns()
        if self.record is not None and not call.answered:
            self.record.decoded = decoded
        failed = call.answered or self.error is not None or not call.has_outputs
        result: Any = None
        try:
            result = self.aggregator.finish(self.partial, self.output, failed)
        except Exception as cause:  # noqa: BLE001 - as above
            self.error = self.error or _error(AggregationError, "the aggregator raised", call, cause)
        if call.answered:
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        elif (last := self.last) is not None:
            # numbers alone: a reference to this submission would tie it and its future into a cycle
            measure = functools.partial(
                _timing,
                self.submitted,
                self.encoded,
                self.send_began,
                self.send_ended,
                self.rank_free,
                last.started_ns,
                last.ended_ns,
                self.received,
                decoded,
                time.monotonic_ns(),
            )
            self.future.set_result(result, measure)


def _timing(
    submitted: int,
    encoded: int,
    send_began: int,
    send_ended: int,
    rank_free: int,
    started: int,
    ended: int,
    received: int,
    decoded: int,
    done: int,
) -> StepTiming:
    """Cut the time from submission to `done` at the marks that driver and rank left, all in nanoseconds."""
    sent = min(send_ended, started)
    queued_on_rank = min(max(rank_free - sent, 0), started - sent)
    return StepTiming(
        queued=(send_began - encoded + queued_on_rank) / 1e9,
        driver=(encoded - submitted + sent - send_began + decoded - received) / 1e9,
        wire=(started - sent - queued_on_rank + received - ended) / 1e9,
        worker=(ended - started) / 1e9,
        aggregate=(done - decoded) / 1e9,
        total=(done - submitted) / 1e9,
    )


def _error(kind: type[PayloadError | AggregationError], what: str, call: Call, cause: Exception) -> CallError:
    message = f"{what}: {type(cause).__name__}: {cause}"
    error = kind(message, method=call.method, call_id=call.call_id, epoch=call.epoch)
    error.__cause__ = cause
    return error
