"""What an executor tells its observers: the seam that the step timeline and the metrics are built on.

Without observers, a call costs a few comparisons with None: no record is made.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from asyncexec.errors import AsyncExecError
from asyncexec.inspection import Report


class RankReply(NamedTuple):
    """When a rank had what it replied; nanoseconds of CLOCK_MONOTONIC, the first two on the rank's host.

    Attributes:
        rank: which.
        started: it took the call up.
        ended: its output was there.
        received: the driver had read the reply.
    """

    rank: int
    started: int
    ended: int
    received: int


class CallRecord(msgspec.Struct, eq=False):
    """What happened to one call, and when: nanoseconds of the driver's CLOCK_MONOTONIC, 0 for what did not happen.

    Attributes:
        method: its name.
        ranks: where it runs.
        is_step: whether it is `execute_model` or `sample_tokens`.
        submitted: the caller came.
        encoded: the arguments were encoded, and the call began to wait for its turn.
        call_id, epoch: as in errors.
        sent: the transport was given the call.
        send_ended: the transport had taken it.
        replies: of the ranks whose output was wanted, in the order of their arrival.
        decoded: all outputs were there, and those of the steps before too; aggregation is finished from here on.
        done: the future was.
        error: what the future failed with.
    """

    method: str
    ranks: Sequence[int]
    is_step: bool
    submitted: int
    encoded: int
    observers: tuple["Observer", ...]
    call_id: int = 0
    epoch: int = 0
    sent: int = 0
    send_ended: int = 0
    replies: list[RankReply] = []
    decoded: int = 0
    done: int = 0
    error: BaseException | None = None

    def settle(self, error: BaseException | None) -> None:
        """The future is done; tell the observers."""
        self.done, self.error = time.monotonic_ns(), error
        for observer in self.observers:
            observer.call_done(self)

    def await_ended(self, cancelled: bool) -> None:
        """A task that awaited the future goes on, or gave up; tell the observers."""
        now = time.monotonic_ns()
        for observer in self.observers:
            observer.call_awaited(self, now, cancelled)


class Observer(Protocol):
    """Is told what an executor does, on its event loop: methods return soon, and raise nothing.

    A call is told to those who observed when it was submitted.
    """

    def call_submitted(self, call: CallRecord) -> None:
        """A call was accepted; `call` fills up as it goes forward."""
        ...

    def call_done(self, call: CallRecord) -> None:
        """The future has its result or error."""
        ...

    def call_awaited(self, call: CallRecord, at: int, cancelled: bool) -> None:
        """A task that had awaited the future goes on with what it holds; `cancelled`: it does not wait any more."""
        ...

    def ranks_reported(self, report: Report) -> None:
        """The ranks were asked what they do, by whomever."""
        ...

    def executor_failed(self, cause: AsyncExecError) -> None:
        """The executor has failed."""
        ...
