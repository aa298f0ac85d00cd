"""Every error that asyncexec raises, as one tree.

AsyncExecError
|-- ConfigError (ValueError)          a config, worker or call that cannot work, refused before anything starts
|-- TransportUnavailable              no transport of that name, or one whose dependency is missing
|-- WireError                         a malformed, truncated, oversized or wrong-version frame
|-- ExecutorBusy                      the queue of waiting steps is full
|-- ExecutorClosed                    the executor was not started, or is closed
|   `-- ExecutorFailed                ... or a rank was lost; `cause` says what happened
`-- CallError                         one call failed; knows method, call id, epoch and, where it is one, the rank
    |-- PayloadError                  arguments or result that cannot be encoded, decoded or are too large
    |-- WorkerError                   the worker raised; carries the remote type, message and traceback
    |   `-- WorkerStartError          ... while it was being set up or constructed
    |-- WorkerDied                    the rank's process ended
    |-- ReplyLost                     the rank answered a later call first, so this answer will never come
    |-- StepTimeout (TimeoutError)    the deadline passed; knows which ranks had not answered
    `-- AggregationError              the aggregator raised
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncexec.inspection import Report


class AsyncExecError(Exception):
    """The root of the tree.  Errors survive pickling and copying with all their attributes."""

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[AsyncExecError], args: tuple[Any, ...], attributes: dict[str, Any]) -> AsyncExecError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


class ConfigError(AsyncExecError, ValueError):
    """A configuration, a worker or a call that cannot work; the message names the key and what would be valid."""


class TransportUnavailable(AsyncExecError):
    """There is no such transport, or what it depends on is not installed; the message says what to install."""


class WireError(AsyncExecError):
    """A frame that breaks the wire format; the connection it came over cannot be used any further."""


class ExecutorBusy(AsyncExecError):
    """As many steps wait for a slot as the configuration allows; `await executor.slot()` first."""


class ExecutorClosed(AsyncExecError):
    """The executor has not been started, or is closed."""


class ExecutorFailed(ExecutorClosed):
    """The executor cannot run any further call.

    Attributes:
        cause: the error that ended it.
    """

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause
        super().__init__(f"the executor has failed: {cause}")


class RankUnhealthy(AsyncExecError):
    """Ranks that are stopped, do not answer, have died, or make no progress in their call.

    Attributes:
        ranks: which.
        report: what every rank was doing.
    """

    def __init__(self, message: str, ranks: Sequence[int], report: "Report") -> None:
        self.ranks = tuple(ranks)
        self.report = report
        super().__init__(message)


class CallError(AsyncExecError):
    """One call failed.

    Attributes:
        message: what happened, without the call's coordinates.
        method: the method called, or a callable's qualified name.
        call_id: the call's number within its epoch.
        epoch: which set of ranks ran it; counts up whenever the executor is re-initialised.
        rank: the rank at fault; None where it is not one rank.
        others: errors of further ranks that arrived before the call was settled.
    """

    def __init__(
        self, message: str, *, method: str = "", call_id: int = 0, epoch: int = 0, rank: int | None = None
    ) -> None:
        self.message = message
        self.method = method
        self.call_id = call_id
        self.epoch = epoch
        self.rank = rank
        self.others: list[CallError] = []
        super().__init__(message)

    def __str__(self) -> str:
        where = f"rank {self.rank}, " if self.rank is not None else ""
        call = f" [{where}{self.method}, call {self.call_id}, epoch {self.epoch}]" if self.method else ""
        return f"{self.message}{call}"


class PayloadError(CallError):
    """Arguments that cannot be encoded or are too large, or a result that cannot be decoded.

    A result that the rank cannot encode, or that is too large, is a `WorkerError` of that rank.
    """


class WorkerError(CallError):
    """The worker's method raised.

    Attributes:
        remote_type: qualified name of the exception's class on the rank.
        remote_message: `str()` of the exception there.
        remote_traceback: the traceback as the rank printed it.
    """

    def __init__(
        self,
        remote_type: str,
        remote_message: str,
        remote_traceback: str,
        *,
        method: str = "",
        call_id: int = 0,
        epoch: int = 0,
        rank: int | None = None,
    ) -> None:
        self.remote_type = remote_type
        self.remote_message = remote_message
        self.remote_traceback = remote_traceback
        super().__init__(
            f"{remote_type}: {remote_message}" if remote_message else remote_type,
            method=method,
            call_id=call_id,
            epoch=epoch,
            rank=rank,
        )

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n\nOn the rank:\n{self.remote_traceback}" if self.remote_traceback else text


class WorkerStartError(WorkerError):
    """A rank could not be set up, or its worker could not be constructed."""

    @classmethod
    def of(cls, error: WorkerError) -> "WorkerStartError":
        """The start error that a worker's `error` is."""
        return cls(error.remote_type, error.remote_message, error.remote_traceback, method="start", rank=error.rank)


class WorkerDied(CallError):
    """A rank's process ended.

    Attributes:
        pid: the process, where the transport knows it.
        exit_code: what it exited with; None when a signal ended it or nothing is known.
        signal: the signal's name, such as "SIGKILL"; None when it exited.
        last_call: the last call that it had been sent and that was not done, such as "execute_model, call 7".
        stderr: the end of what it wrote to standard error.
        node: the host that it ran on, where the transport places ranks on several.
    """

    def __init__(
        self,
        message: str,
        *,
        pid: int | None = None,
        exit_code: int | None = None,
        signal: str | None = None,
        last_call: str = "",
        stderr: str = "",
        node: str | None = None,
        method: str = "",
        call_id: int = 0,
        epoch: int = 0,
        rank: int | None = None,
    ) -> None:
        self.last_call = last_call
        self.stderr = stderr
        self.node = node
        self.pid = pid
        self.exit_code = exit_code
        self.signal = signal
        super().__init__(message, method=method, call_id=call_id, epoch=epoch, rank=rank)

    def __str__(self) -> str:
        last = f"\nIts last call: {self.last_call}" if self.last_call else ""
        stderr = f"\nThe end of its standard error:\n{self.stderr.rstrip()}" if self.stderr else ""
        return f"{super().__str__()}{last}{stderr}"


class ReplyLost(CallError):
    """A rank replied to a later call although it owed a reply to this one: replies come in call order."""


class StepTimeout(CallError, TimeoutError):
    """The call's deadline passed.

    Attributes:
        timeout: the limit, in seconds.
        waiting_for: the ranks that had not answered; empty when the call had not been sent yet.
        report: what every rank was doing then, and whom the others waited for; None when it had not been sent.
    """

    def __init__(
        self,
        message: str,
        *,
        timeout: float,
        waiting_for: Sequence[int],
        method: str = "",
        call_id: int = 0,
        epoch: int = 0,
    ) -> None:
        self.timeout = timeout
        self.waiting_for = tuple(waiting_for)
        self.report: Report | None = None
        super().__init__(message, method=method, call_id=call_id, epoch=epoch)

    def __str__(self) -> str:
        return super().__str__() if self.report is None else f"{super().__str__()}\n\n{self.report.with_stacks()}"


class AggregationError(CallError):
    """The aggregator raised while it merged the ranks' outputs; `__cause__` is what it raised."""
