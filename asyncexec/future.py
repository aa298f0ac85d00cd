"""StepFuture: what a submitted call gives back.  Awaitable any number of times, by any number of tasks."""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future as ConcurrentFuture
from typing import Any, Generic, TypeVar

import msgspec

from asyncexec.observing import CallRecord

T = TypeVar("T")


class StepTiming(msgspec.Struct, frozen=True):
    """Where the time of one completed call went, in seconds.  The parts add up to `total`.

    Attributes:
        queued: waiting for a slot in the driver, and on the rank for the calls before it.
        driver: encoding, sending, decoding in the driver.
        wire: from the driver's last byte written to the rank taking it up, and from the rank's reply to the driver
            having read it.
        worker: on the rank that replied last: decoding, waiting for the earlier pipeline stages, the worker's
            method, and a deferred output.
        aggregate: in the aggregator.
        total: from submission until the future was done.
    """

    queued: float
    driver: float
    wire: float
    worker: float
    aggregate: float
    total: float


class StepFuture(Generic[T]):
    """The result of one call, which is there later.

    Each `await` waits on its own: cancelling it, or timing it out, abandons that await and nothing else.  A result
    that nobody awaits is dropped in silence, an error too: the executor's failure callbacks tell of what matters.

    Futures are made by an Executor, belong to its event loop, and are done exactly once.
    """

    __slots__ = ("_done", "_error", "_loop", "_measure", "_record", "_result", "_waiters", "call_id")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._done = False
        self._result: Any = None
        self._error: BaseException | None = None
        self._waiters: list[asyncio.Future[None] | ConcurrentFuture[T]] = []
        self.call_id = 0
        self._measure: Callable[[], StepTiming] | None = None
        self._record: CallRecord | None = None

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            try:
                yield from waiter
            finally:
                if not self._done:
                    self._waiters.remove(waiter)
                if self._record is not None:
                    self._record.await_ended(not self._done)
        return self.result()

    def done(self) -> bool:
        """Whether the result or an error is there."""
        return self._done

    def result(self) -> T:
        """The result, or raises the error; raises asyncio.InvalidStateError while neither is there."""
        if not self._done:
            raise asyncio.InvalidStateError("the call is not done; await the future")
        if self._error is not None:
            raise self._error.with_traceback(None)
        result: T = self._result
        return result

    def exception(self) -> BaseException | None:
        """The error, or None; raises asyncio.InvalidStateError while the call is not done."""
        if not self._done:
            raise asyncio.InvalidStateError("the call is not done; await the future")
        return self._error

    @property
    def timing(self) -> StepTiming | None:
        """Where the time went; None while the call is not done, and if it failed."""
        return None if self._measure is None else self._measure()

    def concurrent(self) -> ConcurrentFuture[T]:
        """A view for other threads, whose `result(timeout)`, `done()` and callbacks work as usual.

        May be called on any thread.  Cancelling the view abandons the view and nothing else.  Waiting for it on the
        event loop's own thread would wait for ever.
        """
        view: ConcurrentFuture[T] = ConcurrentFuture()
        if self._done:
            self._pass_on(view)
        else:
            self._loop.call_soon_threadsafe(self.pass_to, view)
        return view

    def pass_to(self, view: ConcurrentFuture[T]) -> None:
        """Complete `view` with this future's result or error; on the event loop."""
        if self._done:
            self._pass_on(view)
        else:
            self._waiters.append(view)

    def set_result(self, result: T, measure: Callable[[], StepTiming] | None = None) -> None:
        """Complete the future; for executors.  `measure` is called when somebody asks for the timing."""
        self._result = result
        self._measure = measure
        self._finish()

    def set_exception(self, error: BaseException) -> None:
        """Fail the future; for executors."""
        self._error = error
        self._finish()

    def observe(self, record: CallRecord) -> None:
        """Tell the record's observers what becomes of the future; for executors."""
        self._record = record

    def _finish(self) -> None:
        if self._done:
            raise asyncio.InvalidStateError("the call is done already")
        self._done = True
        if self._record is not None:
            self._record.settle(self._error)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if isinstance(waiter, ConcurrentFuture):
                self._pass_on(waiter)
            elif not waiter.done():
                waiter.set_result(None)

    def _pass_on(self, view: ConcurrentFuture[T]) -> None:
        if not view.set_running_or_notify_cancel():
            return
        if self._error is not None:
            view.set_exception(self._error)
        else:
            view.set_result(self._result)
