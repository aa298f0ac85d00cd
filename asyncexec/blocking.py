"""An executor for engines that block: the same calls, futures and supervision as `Executor`, without an event loop.

The calls may come from any threads.  Each call is encoded and written to the ranks before `submit` returns; its future
is a `concurrent.futures.Future`, and the thread that waits for it reads the replies itself, see `asyncexec.driven`.
"""

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from asyncexec.aggregate import Aggregator, AllRanks, FirstRank
from asyncexec.config import ExecutorConfig
from asyncexec.driven import DrivenFuture, DrivenLoop
from asyncexec.driver import Driver
from asyncexec.errors import AsyncExecError, ExecutorClosed
from asyncexec.future import StepFuture
from asyncexec.inspection import Report
from asyncexec.wire import NO_RANK

_ALL = AllRanks()
_ONE = FirstRank()


class _Held(NamedTuple):
    """A notice that goes with the next call."""

    method: str
    args: Sequence[Any]
    joins: str


class BlockingExecutor:
    """Runs one worker class on every rank, for an engine whose loop is a thread.

    Args:
        config: as for `create_executor`.
        worker: as for `create_executor`.
        worker_kwargs: as for `create_executor`.

    The errors are those of `asyncexec.Executor`; a future has them as its exception.
    """

    def __init__(self, config: ExecutorConfig, worker: str | type, worker_kwargs: Mapping[str, Any]) -> None:
        self._driver = _Driver(config, worker, worker_kwargs, None)
        self._loop = DrivenLoop()
        self._held: collections.deque[_Held] = collections.deque()
        self._ended = False

    def start(self) -> None:
        """Bring up the ranks and construct their workers; raises what `Executor.start` raises."""
        self._loop.start()
        # on the watcher's thread, which lasts: the kernel ends a rank with the thread that spawned it
        try:
            self._loop.call(self._driver.start())
        except BaseException:
            self._end()
            raise

    def submit(
        self,
        method: str | Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        output_rank: int | None = None,
        aggregator: Aggregator | None = None,
        is_step: bool = False,
    ) -> DrivenFuture[Any]:
        """Have every rank run a method, in order with what was submitted before; returns at once.

        Args:
            method: its name, or a callable that is given the worker first.
            args: positional arguments.
            kwargs: keyword arguments.
            timeout: seconds from now; None is the configuration's limit.
            output_rank: the one rank whose result is wanted; None is a list of every rank's.
            aggregator: merges the ranks' results into one; needs `output_rank`, whose own result it builds upon.
            is_step: whether it completes in order with the other steps, as the aggregator may need it.

        Raises:
            ExecutorClosed, ExecutorFailed, PayloadError: as `Executor` does.
        """
        future: DrivenFuture[Any] = DrivenFuture(self._loop)
        merge = aggregator or (_ALL if output_rank is None else _ONE)
        if self._ended:
            raise ExecutorClosed("the executor is closed")
        self._loop.do(self._submit, future, method, args, kwargs or {}, timeout, output_rank or 0, merge, is_step)
        return future

    def _submit(
        self, future: DrivenFuture[Any], method: str | Callable[..., Any], args: Sequence[Any], *call: Any
    ) -> None:
        if self._held:
            args = [*args, *self._send_held(method)]
        self._driver.submit(method, args, *call).pass_to(future)

    def notify(self, method: str, args: Sequence[Any] = ()) -> None:
        """Have every rank run a method of which nobody wants an answer, in order with what was submitted.

        An error is logged, and counted in `Executor.counters`.  It raises what `submit` raises.
        """
        if self._ended:
            raise ExecutorClosed("the executor is closed")
        self._loop.do(self._notify, method, args)

    def hold(self, method: str, args: Sequence[Any], *, joins: str) -> None:
        """As `notify`, but sent with the next call, whoever submits it: one message instead of two.

        Args:
            method: what the ranks run before the next call, unless that is of the method `joins`.
            args: positional arguments, encoded when they are sent: a `Snapshot` of what may change meanwhile.
            joins: a method that does the work of `method` too when it is given `args` as its last arguments.

        Raises:
            ExecutorClosed: as `submit` does.  Whatever else `submit` raises, the next call does.
        """
        if self._ended:
            raise ExecutorClosed("the executor is closed")
        if self._held:
            self._loop.do(self._send_held)
        self._held.append(_Held(method, args, joins))

    def _notify(self, method: str, args: Sequence[Any]) -> None:
        self._send_held()
        self._send_notice(method, args)

    def _send_held(self, method: str | Callable[..., Any] = "") -> Sequence[Any]:
        """Send what is held before a call of `method`, on the loop; returns the arguments that this call takes over."""
        while self._held:
            held = self._held.popleft()
            if held.joins == method and not self._held:
                return held.args
            self._send_notice(held.method, held.args)
        return ()

    def _send_notice(self, method: str, args: Sequence[Any]) -> None:
        self._driver.submit(method, args, {}, None, NO_RANK, _ONE, True)

    @property
    def failure(self) -> AsyncExecError | None:
        """What ended the executor; None while nothing did."""
        return self._driver.failure

    def add_failure_callback(self, callback: Callable[[AsyncExecError], None]) -> None:
        """Have `callback(cause)` called when the executor fails, on any thread; at once if it has failed already."""
        self._loop.do(self._driver.add_failure_callback, callback)

    def report(self) -> Report:
        """What every rank is doing; see `Executor.report`."""
        return self._loop.call(self._driver.report())

    def check_health(self, timeout: float | None = None) -> None:
        """Raise RankUnhealthy if a rank is stuck; see `Executor.check_health`."""
        self._loop.call(self._driver.check_health(timeout))

    def close(self) -> None:
        """End the ranks, gracefully and within the limits of the configuration.  May be called again."""
        if self._loop.is_held:
            self._driver.abort()  # a failure callback closes: the rest is for a later call, from outside of the loop
        elif not self._ended:
            self._ended = True
            self._loop.call(self._driver.aclose())
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._loop.end()


class _Driver(Driver):
    """The driver, on a loop that no thread owns for good."""

    def submit(
        self,
        method: str | Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        timeout: float | None,
        output_rank: int,
        aggregator: Aggregator,
        is_step: bool,
    ) -> StepFuture[Any]:
        submitted = time.monotonic_ns()
        name = method if isinstance(method, str) else getattr(method, "__qualname__", repr(method))
        if timeout is None and output_rank != NO_RANK:  # of a notice nobody waits for the end
            timeout = self._config.timeouts.for_method(name, step=is_step)
        frame = self._encode(name, method, args, kwargs)
        return self._calls.submit(
            frame,
            name,
            self._ranks,
            output_rank,
            aggregator,
            timeout,
            slot=is_step,
            ordered=is_step,
            submitted=submitted,
        )

    def _check_thread(self) -> None:
        """Whoever comes has the loop: the blocking executor sees to that."""
